"""A package of a user, with environments that wmcache does not know."""

import gymnasium as gym
import numpy as np


class Dots(gym.Env):
    """Push a dot to the right edge; a lamp in one of three places is lit."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(self, render_mode=None, careless=False):
        self.render_mode, self.careless = render_mode, careless
        self.action_space = gym.spaces.Box(np.float32([-2, -2]), np.float32([2, 1]))
        self.observation_space = gym.spaces.Dict(
            {
                "camera": gym.spaces.Box(0, 255, (20, 30, 3), np.uint8),
                "robot": gym.spaces.Dict({"xy": gym.spaces.Box(0.0, 1.0, (2,), np.float64)}),
                "lamp": gym.spaces.Discrete(3),
                "step": gym.spaces.Box(0, 100, (1,), np.int64),
            }
        )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.xy, self.lamp, self.count = self.np_random.uniform(0.2, 0.8, 2), int(self.np_random.integers(3)), 0
        return self._look(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        rng = np.random.default_rng() if self.careless and self.count == 3 else self.np_random
        noise = rng.normal(size=2)
        self.xy = np.clip(self.xy + 0.05 * action + 0.001 * noise, 0.0, 1.0)
        self.count += 1
        return self._look(), float(self.xy[0]), bool(self.xy[0] >= 1.0), False, {}

    def render(self):
        frame = np.zeros((20, 30, 3), np.uint8)
        frame[int(19 * self.xy[1]), int(29 * self.xy[0])] = 255
        frame[:2, self.lamp] = (255, 0, 0)
        return frame

    def _look(self):
        step = np.array([self.count])
        return {"camera": self.render(), "robot": {"xy": self.xy.copy()}, "lamp": self.lamp, "step": step}


class Unbounded(Dots):
    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Blind(Dots):
    metadata = {"render_modes": ["human"], "render_fps": 12}  # noqa: RUF012


class Grey(Dots):
    def render(self):
        return super().render()[..., 0]


class Flicker(Dots):
    def render(self):
        return super().render() + np.random.default_rng().integers(0, 2, (20, 30, 3), np.uint8)


class Broken(Dots):
    def step(self, action):
        raise RuntimeError("no motor")


for kind in (Dots, Unbounded, Blind, Grey, Flicker, Broken):
    gym.register(id=f"{kind.__name__}-v0", entry_point=kind, max_episode_steps=9)
gym.register(id="Careless-v0", entry_point=Dots, kwargs={"careless": True})
