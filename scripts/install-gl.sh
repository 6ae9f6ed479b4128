#!/bin/sh
# Install the OpenGL libraries of MuJoCo, and GLib for PushT, as root or with password-free sudo; otherwise print the command that does.
# Usage: install-gl.sh PYTHON
set -u
packages="libegl1 libgl1 libglib2.0-0"
install="apt-get update && apt-get install --yes --no-install-recommends $packages"
if command -v apt-get >/dev/null; then
    if [ "$(id -u)" = 0 ]; then
        echo "installing $packages, which MuJoCo needs to render"
        DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null
    elif sudo -n true 2>/dev/null; then
        echo "installing $packages, which MuJoCo needs to render"
        sudo DEBIAN_FRONTEND=noninteractive sh -c "$install" >/dev/null
    else
        echo "MuJoCo needs OpenGL libraries; install them with: sudo sh -c '$install'" >&2
    fi
else
    echo "MuJoCo needs the libraries libEGL.so.1 and libGL.so.1; install them with this system's package manager" >&2
fi
"$1" -m wmcache.envs.check
