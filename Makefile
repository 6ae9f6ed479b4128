# `make demo` and `make test` do all the set-up that they need; see CONTRIBUTING.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv is five times as fast as pip. It uses the system's certificates, as git does.
INSTALL = $(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --config-settings editable_mode=strict
DEMO := data/demo
SMALL := --width 128 --depth 4 --heads 4 --dropout 0 --lr 1e-3
PLAN := $(DEMO)/runs/pointmaze-umaze-tcn-64/plan-all-x1-50x100

# Keep compiled modules: without them each of the hundreds of processes that the tests start takes seven seconds instead of three.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup test test-long lint docs pictures clean

setup: $(VENV)/.linked
	@$(BIN)/python -m wmcache.envs.check >/dev/null 2>&1 && $(BIN)/python -c 'import cv2' 2>/dev/null || scripts/install-gl.sh $(BIN)/python

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt excludes.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(INSTALL) --constraint constraints.txt --excludes excludes.txt --editable '.[dev]'
	@touch $@

# A strict editable install links each file, so that mypy finds the package. A folder's time changes when a file is added.
# (`study/.` is the folder; `study` is the target below.)
$(VENV)/.linked: $(VENV)/.installed bench cache cluster commands common engine envs envs/deformable envs/distract envs/pointmaze envs/pointmaze/mazes envs/policies pipeline pipeline/encoders pipeline/importers planner planner/controllers planner/policies planner/protocols planner/solvers study/. trainer trainer/decoders trainer/models trainer/models/ddp_wm trainer/models/td_mpc2
	$(INSTALL) --no-deps --reinstall-package wmcache --editable .
	@touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p wmcache
	$(BIN)/lint-imports

# Two processes, because many tests wait for programs that they start. One thread each, because more would wait for each other.
test: export OMP_NUM_THREADS := 1
test: lint
	$(BIN)/pytest -n 2 --dist loadfile -m "not cluster and not sweep"

# Tests that take too long for CI: real servers, schedulers and ranks that are killed; sweeps over more moments to be killed at than
# `make test` tries; property tests on new random examples; the built wheel and the documentation's site.
test-long: export OMP_NUM_THREADS := 1
test-long: setup
	$(BIN)/pytest --hypothesis-profile search -m "cluster or sweep or hypothesis"

# The documentation as a site, build/docs/docs/index.html. A broken link or reference is an error.
docs: setup
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --jobs auto -c docs . build/docs

STUDIES := systems transfer factorial ablations
EXPERIMENTS := demo study $(STUDIES) ladder unseen world-models rwm mazes
.PHONY: $(EXPERIMENTS)
$(EXPERIMENTS): export WMCACHE_HOME := $(DEMO)
$(EXPERIMENTS): export PATH := $(CURDIR)/$(BIN):$(PATH)

# The tutorial: make prints each command before it runs it. Run again, it resumes.
demo: setup
	wmcache collect --env wmcache/PointMaze-UMaze-v0 --episodes 200 --image-size 112
	wmcache fit --encoder tcn
	wmcache extract --encoder tcn
	wmtrain --cache $(DEMO)/stores/pointmaze-umaze/tcn-64.zarr --width 96 --depth 3 --heads 3 --dropout 0 --lr 1e-3 --steps 1200
	wmplan --run $(DEMO)/runs/pointmaze-umaze-tcn-64

# Which representation makes the same world model plan best, of those that need no hub.
study: setup
	wmcache study study/default.toml

# One study each, on the demo's frames: which system reaches most goals; a world model in worlds that it has not seen; amounts of data over
# seeds; choices in training.
$(STUDIES): setup
	wmcache study study/$@.toml

# Tasks on which systems and representations separate: budgets, episodes and pixels alone; encoders; distractions (docs/results.md).
LADDER := wmcache study study/ladder.toml
ladder: setup
	$(LADDER) --encoder tcn
	$(LADDER) --models dino-wm --fractions 1 --out $(DEMO)/studies/ladder-encoders
	for kind in ball colors jitter; do $(LADDER) --env UMaze+$$kind@0 --encoder tcn --encoder 'pixels (16 x 16)' --encoder random-vit \
	  --models dino-wm --models gcbc --fractions 1 || exit 1; done

# A model of all layouts but the giant one, planned in random mazes that it has not seen.
SEEN := UMaze Open Medium Large
FRAMES := $(DEMO)/unseen/frames
STORES := $(DEMO)/unseen/stores
unseen: setup
	for maze in $(SEEN); do wmcache collect --env $$maze --episodes 100 --image-size 112 --out $(FRAMES)/$$maze || exit 1; done
	wmcache fit --encoder tcn $(SEEN:%=--dataset $(FRAMES)/%) --out $(DEMO)/encoders/unseen-tcn.safetensors
	for maze in $(SEEN); do wmcache extract --encoder tcn --weights $(DEMO)/encoders/unseen-tcn.safetensors --dataset $(FRAMES)/$$maze \
	  --out $(STORES)/$$maze.zarr || exit 1; done
	wmtrain $(SEEN:%=--cache $(STORES)/%.zarr) $(SMALL) --steps 2400 --out $(DEMO)/runs/unseen
	for seed in 100 101 102 103 104; do wmplan --run $(DEMO)/runs/unseen --env Maze7x7-$$seed --protocol mpc-100 --min-distance 1.5 \
	  --episodes 20 --baselines random,zero,untrained,expert || exit 1; done

# World Models' two tasks (docs/world-models.md): an hour for take cover, three for CarRacing.
world-models: setup
	wmcache rounds study/take-cover.toml
	wmcache rounds study/car-racing.toml

# The tables of the U-maze in docs/world-models.md: MPC on rwm, a controller trained in the dream, and RWM against teacher forcing.
UMAZE := $(DEMO)/stores/pointmaze-umaze/tcn-64.zarr
NOISY := $(DEMO)/stores/noisy-umaze/tcn-64.zarr
RUNS := $(DEMO)/runs
FORCED := --model rwm --frameskip 2 --observed-steps 6 --all-observed --lr 1e-3
rwm: demo
	wmtrain --cache $(UMAZE) --model rwm --steps 6000 --lr 1e-3 --out $(RUNS)/rwm
	wmplan --run $(RUNS)/rwm --episodes 200
	wmtrain --cache $(UMAZE) --model mdn-rnn --steps 2400 --lr 2e-3 --out $(RUNS)/mdn-rnn
	wmcache controller --run $(RUNS)/mdn-rnn --generations 600 --check-every 20
	wmplan --run $(RUNS)/mdn-rnn --policy $(RUNS)/mdn-rnn/controller --episodes 200
	wmtrain --cache $(UMAZE) $(FORCED) --forecast 8 --steps 2000 --out $(RUNS)/forecast-8
	wmtrain --cache $(UMAZE) $(FORCED) --forecast 1 --steps 5800 --out $(RUNS)/forecast-1
	wmcache bench rollout --run $(RUNS)/forecast-8 --run $(RUNS)/forecast-1 --steps 20 --observed 6 --windows 1000
	wmcache collect --env NoisyUMaze --episodes 200 --image-size 112 --out $(DEMO)/noisy-umaze
	wmcache extract --dataset $(DEMO)/noisy-umaze --encoder tcn --weights $(DEMO)/encoders/pointmaze-umaze-tcn.safetensors --out $(NOISY)
	wmtrain --cache $(NOISY) $(FORCED) --forecast 8 --steps 2000 --out $(RUNS)/noisy-forecast-8
	wmtrain --cache $(NOISY) $(FORCED) --forecast 1 --steps 5800 --out $(RUNS)/noisy-forecast-1
	wmcache bench rollout --run $(RUNS)/noisy-forecast-8 --run $(RUNS)/noisy-forecast-1 --steps 20 --observed 6 --windows 1000

# Goals beyond the planning horizon: the medium and the large maze, scored by path length along the cached frames.
mazes: setup
	wmcache collect --env Medium --episodes 400 --image-size 112
	wmcache fit --dataset $(DEMO)/pointmaze-medium --encoder tcn --steps 500
	wmcache extract --dataset $(DEMO)/pointmaze-medium --encoder tcn
	wmtrain --cache $(DEMO)/stores/pointmaze-medium/tcn-64.zarr $(SMALL) --steps 2000
	wmplan --run $(DEMO)/runs/pointmaze-medium-tcn-64 --distance graph --budget 150
	wmcache collect --env Large --episodes 600 --image-size 112
	wmcache fit --dataset $(DEMO)/pointmaze-large --encoder tcn --steps 800
	wmcache extract --dataset $(DEMO)/pointmaze-large --encoder tcn
	wmtrain --cache $(DEMO)/stores/pointmaze-large/tcn-64.zarr $(SMALL) --steps 2500
	wmplan --run $(DEMO)/runs/pointmaze-large-tcn-64 --distance graph --budget 200

# The pictures of README and docs/results.md, from the demo's report.
pictures: demo
	cp $(PLAN)/figures/*.png docs/images/
	$(BIN)/wmcache preview $(DEMO)/stores/pointmaze-umaze/tcn-64.zarr --out docs/images/preview.png
	$(BIN)/python -c "import glob, imageio.v3 as i; \
	  i.imwrite('docs/images/episode.gif', i.imread(sorted(glob.glob('$(PLAN)/videos/*.mp4'))[0])[:41], duration=60, loop=0)"

clean:
	rm -rf build $(VENV) $(DEMO) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
