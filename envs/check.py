"""`python -m wmcache.envs.check`: draw one frame, or report in one line what is missing."""

from __future__ import annotations

import sys

from wmcache.envs.mujoco_gl import RendererError, mujoco, open_renderer

BALL = "<mujoco><worldbody><light pos='0 0 2'/><geom type='sphere' size='0.3'/></worldbody></mujoco>"

if __name__ == "__main__":
    model = mujoco.MjModel.from_xml_string(BALL)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    try:
        renderer = open_renderer(model, 64)
    except RendererError as error:
        sys.exit(str(error))
    renderer.update_scene(data)
    frame = renderer.render()
    renderer.close()
    if frame.max() == frame.min():
        sys.exit("MuJoCo draws empty frames; choose another MUJOCO_GL (egl, osmesa, glfw)")
