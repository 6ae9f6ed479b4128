"""The write side: frames in, tokens out. Imports envs and cache."""
