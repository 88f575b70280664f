"""Play, score and film saved policies, without a screen.

    python results/play.py runs/td3_bc/hopper-medium/seed0 --episodes 20
    python results/play.py runs/td3_bc/hopper-medium/seed0 --video hopper.mp4
    python results/play.py runs/bc/hopper-medium/seed0 runs/td3_bc/hopper-medium/seed0 \\
        --video both.gif --labels clone TD3+BC

A GIF needs nothing more; an .mp4 needs `pip install imageio-ffmpeg`. MuJoCo draws without a screen
where EGL is installed (on Debian: apt install libegl1).
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is loaded: draw without a screen
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]  # lets this file find common.py
from common import (
    SUITE,
    check_range,
    decode_action,
    encode_obs,
    env_id,
    evaluate,
    fail,
    load_policy,
)

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 320, 240  # pixels of one policy's picture
FRAMES_PER_SECOND = 16


def env_of(run: Path) -> str:
    """The specification of the environment that a saved policy belongs to."""
    path = run / "policy.pt" if run.is_dir() else run
    if not path.exists():
        fail(f"there is no {path}")
    try:
        env_spec = torch.load(path, map_location="cpu", weights_only=True)["env_spec"]
    except Exception as error:
        fail(f"{path} is no saved policy ({type(error).__name__}: {error})")
    if env_spec is None:
        fail(f"{path} belongs to no environment, so there is nothing to play")
    return env_spec


def film(act, env_spec: str, seed: int, most_steps: int) -> list[Image.Image]:
    """One episode as pictures, every few steps one. Raises what the environment raises."""
    spec = gym.envs.registration.EnvSpec.from_json(env_spec)
    sized = {}
    if "mujoco" in str(spec.entry_point):
        sized = {"width": WIDTH, "height": HEIGHT, "camera_name": "track"}  # it follows the body
    try:
        env = gym.make(spec, render_mode="rgb_array", disable_env_checker=True, **sized)
        obs, _ = env.reset(seed=seed)
        env.render()
    except Exception as error:
        needs = "render_mode='rgb_array'"
        if "mujoco" in str(spec.entry_point):
            needs = "EGL (apt install libegl1)"
        elif "classic_control" in str(spec.entry_point):
            needs = "pygame (pip install pygame)"
        fail(f"{spec.id} can't be drawn here ({type(error).__name__}: {error}); it needs {needs}")
    every = max(1, round(env.metadata.get("render_fps", 30) / FRAMES_PER_SECOND))
    if hasattr(act, "start"):
        act.start(1)
    pictures, total = [], 0.0
    for step in range(most_steps):
        if step % every == 0:
            pixels = np.asarray(env.render(), np.uint8)  # (height, width, 3)
            picture = Image.fromarray(pixels).resize((WIDTH, HEIGHT))
            write(picture, 26, f"return {total:,.0f}")
            pictures.append(picture)
        row = torch.as_tensor(encode_obs(env.observation_space, obs))[None]
        action = act(row)[0].numpy()
        own = decode_action(env.action_space, action)
        obs, reward, terminated, truncated, _ = env.step(own)
        total += float(reward)
        if hasattr(act, "record"):
            act.record(0, float(reward))
        if terminated or truncated:
            break
    env.close()
    return pictures


def write(picture: Image.Image, top: int, text: str) -> None:
    font = ImageFont.load_default(size=16)
    ImageDraw.Draw(picture).text((8, top), text, "white", font, stroke_width=2, stroke_fill="black")


def side_by_side(films: list[list[Image.Image]], labels: list[str]) -> list[Image.Image]:
    """One film of several; one that ends before the others stays at its last picture."""
    frames = []
    for i in range(max(map(len, films))):
        frame = Image.new("RGB", (WIDTH * len(films), HEIGHT))
        for column, (pictures, label) in enumerate(zip(films, labels)):
            picture = pictures[min(i, len(pictures) - 1)].copy()
            write(picture, 6, label)
            frame.paste(picture, (WIDTH * column, 0))
        frames.append(frame)
    return frames


def save(frames: list[Image.Image], path: Path) -> None:
    try:
        if path.suffix.lower() == ".gif":
            small = [frame.quantize(32, dither=Image.Dither.NONE) for frame in frames]
            small[0].save(path, save_all=True, append_images=small[1:], loop=0, optimize=True,
                          duration=round(1000 / FRAMES_PER_SECOND))
        else:
            import imageio.v2
            pictures = [np.asarray(frame) for frame in frames]
            imageio.v2.mimsave(path, pictures, fps=FRAMES_PER_SECOND)
    except Exception as error:
        fail(f"{path} can't be written ({error}); .mp4 needs pip install imageio-ffmpeg, "
             "a .gif needs nothing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs, or policy.pt files")
    parser.add_argument("--episodes", type=int, default=20, help="to score")
    parser.add_argument("--seed", type=int, default=0, help="of the first episode")
    parser.add_argument("--video", type=Path, help="film the first episode: a .gif or .mp4 file")
    parser.add_argument("--labels", nargs="+", help="names in the film, one for each run")
    parser.add_argument("--most-steps", type=int, default=1000, help="of the film")
    options = parser.parse_args()
    check_range(options, "episodes most_steps", 1)
    check_range(options, "seed", 0)
    if options.video and options.video.suffix.lower() not in (".gif", ".mp4"):
        fail(f"--video {options.video}: give a name that ends in .gif or .mp4")
    if options.video and not options.video.parent.is_dir():
        fail(f"--video {options.video}: there is no folder {options.video.parent}")
    labels = options.labels or [str(run) for run in options.runs]
    if len(labels) != len(options.runs):
        fail(f"--labels: {len(labels)} names for {len(options.runs)} runs; give one for each")
    ranges = {entry[0]: entry[1:] for entry in SUITE.values()}
    films = []
    for run in options.runs:
        env_spec = env_of(run)
        act = load_policy(run)
        try:
            returns = evaluate(act, env_spec, options.episodes, options.seed)
            low, high = ranges.get(env_id(env_spec), (np.nan, np.nan))
            score = 100 * (returns.mean() - low) / (high - low)
            shown = "" if np.isnan(score) else f"   score {score:.1f}"
            print(f"{run}: return {returns.mean():.1f} ± {returns.std():.1f} over "
                  f"{len(returns)} episodes{shown}", flush=True)
            if options.video:
                films.append(film(act, env_spec, options.seed, options.most_steps))
        except KeyboardInterrupt:
            fail("stopped")
        except (Exception, SystemExit) as error:  # whatever an environment may raise
            if isinstance(error, SystemExit) and error.code == 2:
                raise  # a message of ours
            fail(f"playing {run} in {env_id(env_spec)} failed ({type(error).__name__}: {error})")
    if options.video:
        save(side_by_side(films, labels), options.video)
        print(f"film: {options.video}")


if __name__ == "__main__":
    main()
