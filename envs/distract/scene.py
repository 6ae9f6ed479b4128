"""Distraction of MuJoCo's scenes: the colours of its objects, the camera, and what is behind the objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wmcache.envs.distract.looks import CameraMove, Look, waves
from wmcache.envs.mujoco_gl import mujoco, open_renderer

Frame = NDArray[np.uint8]
KINDS = ("colors", "camera", "background", "jitter")
Array = NDArray[Any]
OBJECTS = ("geom", "site", "tendon", "skin")
DEFAULT_COLOUR = np.array([0.5, 0.5, 0.5, 1.0], np.float32)
PATTERN = 128
"""Side of the pattern that covers a textured surface, in pixels; it is repeated."""


class Scene:
    """Draws the data of one model under looks. Its physics, and how others draw it, stay as they are."""

    def __init__(self, model: Any, height: int, width: int) -> None:
        """Open a renderer; raises RendererError without OpenGL."""
        self._model = model
        self._renderer = open_renderer(model, height, width)
        self._textures: tuple[Any, int] | None = None  # distraction and episode of those that the renderer has

    def draw(self, data: Any, camera: Any, look: Look, copies: Mapping[int, Array] | None = None) -> Frame:
        """Draw a frame [height, width, 3].

        Args:
            camera: a number, a name or an MjvCamera.
            copies: bodies that are drawn a second time -> how far from the first, [3].
        """
        renderer, model = self._renderer, self._model
        with recoloured(model, look):
            if "colors" in look.kinds and self._textures != (worn := (look.distraction, look.episode)):
                self._upload_textures(look)
                self._textures = worn
            renderer.update_scene(data, camera)
            for body, offset in (copies or {}).items():
                draw_copy(renderer.scene, model, body, offset)
            for eye in renderer.scene.camera:
                if "camera" in look.kinds:
                    move(eye, look.camera, model)
                if "jitter" in look.kinds:
                    shift(eye, *look.shift, renderer.width / renderer.height)
            frame: Frame = renderer.render()
        if "background" in look.kinds:
            behind = self._behind()
            frame[behind] = look.background(*frame.shape[:2])[behind]
        return frame

    def close(self) -> None:
        """Free the GL context."""
        self._renderer.close()

    def _behind(self) -> NDArray[np.bool_]:
        """Find the pixels of the sky and of planes that belong to the world, [height, width]."""
        model, renderer = self._model, self._renderer
        renderer.enable_segmentation_rendering()
        number, kind = np.moveaxis(renderer.render(), -1, 0)
        renderer.disable_segmentation_rendering()
        plane = (model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_bodyid == 0)
        is_geom = kind == int(mujoco.mjtObj.mjOBJ_GEOM)
        return np.asarray((number < 0) | (is_geom & plane[np.where(is_geom, number, 0)]))

    def _upload_textures(self, look: Look) -> None:
        """Give surfaces a grey pattern, which their material's colour tints, and the sky a colour."""
        model, rng = self._model, look.rng("colors")
        sky = np.asarray(look.colours(1)[0])
        kept = model.tex_data.copy()
        grid = np.arange(PATTERN) / PATTERN
        self._renderer._gl_context.make_current()
        for number in range(model.ntex):
            height, width, channels = (
                int(part[number]) for part in (model.tex_height, model.tex_width, model.tex_nchannel)
            )
            if channels < 3:
                continue
            first = int(model.tex_adr[number])
            texture = model.tex_data[first : first + height * width * channels].reshape(height, width, channels)
            if model.tex_type[number] == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
                texture[..., :3] = texture[..., :3].max(-1, keepdims=True) * sky
            else:
                pattern = 0.55 + 0.45 * waves(rng, grid, grid[:, None])
                rows, columns = np.arange(height) % PATTERN, np.arange(width) % PATTERN
                texture[..., :3] = (255 * pattern[np.ix_(rows, columns)]).astype(np.uint8)[..., None]
            mujoco.mjr_uploadTexture(model, self._renderer._mjr_context, number)
        model.tex_data[:] = kept


@contextmanager
def recoloured(model: Any, look: Look) -> Iterator[None]:
    """Give all objects of one colour another one, and each material one of its own, as long as the context is open."""
    if "colors" not in look.kinds:
        yield
        return
    parts = [array for part in OBJECTS if len(array := getattr(model, f"{part}_rgba"))]
    kept = [array.copy() for array in (*parts, model.mat_rgba)]
    known, group = np.unique(np.concatenate([array[:, :3] for array in parts]), axis=0, return_inverse=True)
    colours = np.asarray(look.colours(len(known) + model.nmat))
    # A geom of MuJoCo's default colour has that of its material.
    plain = (model.geom_matid >= 0) & (model.geom_rgba == DEFAULT_COLOUR).all(-1)
    groups = np.split(group.ravel(), np.cumsum([len(array) for array in parts])[:-1])
    for array, numbers in zip(parts, groups, strict=True):
        array[:, :3] = colours[numbers]
    model.geom_rgba[plain, :3] = 0.5
    model.mat_rgba[:, :3] = colours[len(known) :]
    try:
        yield
    finally:
        for array, values in zip((*parts, model.mat_rgba), kept, strict=True):
            array[:] = values


def move(eye: Any, by: CameraMove, model: Any) -> None:
    """Turn a camera of a scene (mjvGLCamera) around the point on its axis that is nearest to the model's centre."""
    position, forward, up = (np.array(part, np.float64) for part in (eye.pos, eye.forward, eye.up))
    depth = float((model.stat.center - position) @ forward)
    pivot = position + (depth if depth > 0 else model.stat.extent) * forward
    turn = rotation(up, by.yaw) @ rotation(np.cross(forward, up), by.pitch)
    forward = turn @ forward
    eye.pos[:] = pivot + by.zoom * turn @ (position - pivot)
    eye.forward[:] = forward
    eye.up[:] = rotation(forward, by.roll) @ turn @ up


def shift(eye: Any, right: float, down: float, aspect: float) -> None:
    """Shift what a camera of a scene (mjvGLCamera) shows, by shares of the frame; `aspect` is its width over its height."""
    height = eye.frustum_top - eye.frustum_bottom
    eye.frustum_center -= right * height * aspect
    eye.frustum_top += down * height
    eye.frustum_bottom += down * height


def draw_copy(scene: Any, model: Any, body: int, offset: Array) -> None:
    """Add what is visible of a body to a scene a second time, at an offset [3]; physics knows nothing of it."""
    bodies = {mujoco.mjtObj.mjOBJ_GEOM: model.geom_bodyid, mujoco.mjtObj.mjOBJ_SITE: model.site_bodyid}
    numbers = {int(kind): number for kind, number in bodies.items()}
    for part in list(scene.geoms[: scene.ngeom]):
        if part.objtype not in numbers or numbers[part.objtype][part.objid] != body:
            continue
        copy = scene.geoms[scene.ngeom]
        mujoco.mjv_initGeom(copy, part.type, part.size, part.pos + offset, part.mat.ravel(), part.rgba)
        for name in (
            "category",
            "camdist",
            "objtype",
            "objid",
            "matid",
            "emission",
            "specular",
            "shininess",
            "reflectance",
        ):
            setattr(copy, name, getattr(part, name))
        copy.segid = scene.ngeom
        scene.ngeom += 1


def rotation(axis: Array, angle: float) -> Array:
    """Return the matrix [3, 3] of a rotation around a unit vector."""
    quaternion, matrix = np.zeros(4), np.zeros(9)
    mujoco.mju_axisAngle2Quat(quaternion, axis, angle)
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)
