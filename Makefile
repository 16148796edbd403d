# Two commands on a fresh machine: `make release` and `make test`. Each first installs what it needs:
# .release what a release needs, .dev all extras, and what tests, checks and measurements need.
PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
CHROMIUM ?= chromium
VENV := .venv
BIN := $(VENV)/bin
RELEASE := $(VENV)/.release
DEV := $(VENV)/.dev

.PHONY: release test test-slow chaos test-fast lint format ui train bench-memory bench-evaluate bench-scorer bench-bits bench-four-bits bench-scale bench-fan-out bench-quantize bench-peers bench-convnet bench-kernels bench-gpu bench-throughput picture system constraints clean

release: $(RELEASE)  ## run the release pipeline; succeeds when it reaches a verdict, and says which
	@$(BIN)/dpq release $(RECIPE); code=$$?; [ $$code -eq 0 ] || [ $$code -eq 2 ]

test: $(DEV)  ## all tests but the slow ones
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-slow: $(DEV)  ## releases on a worker: scripts, schedule, events, heartbeats, a browser
	$(BIN)/python -m pytest -m slow

chaos: $(DEV)  ## 50 kills over 10 releases, then again with PostgreSQL and S3: an hour or more
	PYTHONPATH=tests $(BIN)/python tests/chaos/chaos.py --runner processes
	PYTHONPATH=tests $(BIN)/python tests/chaos/chaos.py --runner dask --team

test-fast: $(DEV)  ## the algorithm alone: no services
	$(BIN)/python -m pytest tests/core tests/test_architecture.py

# Benchmarks run seldom: names and arguments that are no more are found, annotations not asked for.
LOOSE = no-untyped-def no-untyped-call no-any-return no-redef var-annotated has-type misc \
  arg-type assignment call-overload index operator union-attr return-value list-item dict-item \
  func-returns-value import-untyped import-not-found unused-ignore

lint: $(DEV)  ## format, style, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=tests:tests/bench $(BIN)/mypy $(LOOSE:%=--disable-error-code=%) tests/bench
	$(BIN)/lint-imports

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

ui: $(RELEASE)  ## leave the Prefect server and MLflow up
	$(BIN)/dpq ui

train: $(RELEASE)  ## train the quickstart model again
	MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000 \
	$(BIN)/python recipes/quickstart/train.py --output recipes/quickstart/model

bench-memory: $(DEV)  ## memory of quantizing beside its prediction, three sizes
	$(BIN)/python tests/bench/peak_memory.py

bench-evaluate: $(DEV)  ## time of a fake-quantized forward beside the BF16 model's
	$(BIN)/python tests/bench/fake_quant.py

bench-scorer: $(DEV)  ## suites scored as trees of shared prefixes, beside HFLM of lm-eval
	PYTHONPATH=tests $(BIN)/python tests/bench/scorer.py ../shared/models/wiki-llama-12m

bench-bits: $(DEV)  ## perplexity against bits per weight: by plan, at random, by position
	$(BIN)/python tests/bench/bits_curve.py $(RECIPE)

bench-four-bits: $(DEV)  ## ideas for better four bits, each alone and together
	$(BIN)/python tests/bench/four_bits.py $(RECIPE)

bench-scale: $(DEV)  ## what 8B, 70B and 405B take, and the constants measured here (docs/scale.md)
	$(BIN)/python tests/bench/scale.py

bench-fan-out: $(DEV)  ## the quantize stage in plain Python, by one worker process, by two
	$(BIN)/python tests/bench/fan_out.py

bench-quantize: $(DEV)  ## where quantizing's time goes, against its products (docs/quantize-speed.md)
	$(BIN)/python tests/bench/quantize.py --set scheme.scale_search=hessian
	$(BIN)/python tests/bench/quantize.py --set scheme.scale_search=hessian --model 150m --windows 32
	$(BIN)/python tests/bench/quantize.py --set scheme.scale_search=hessian --model 150m --blocks 1 \
		--windows 32 --definition

bench-peers: $(DEV)  ## llm-compressor and AutoRound beside it, in an environment of their own
	$(BIN)/python tests/bench/peers.py

bench-convnet: $(DEV)  ## the whitepaper's ladder on Fashion-MNIST; latency at 224 × 224
	$(BIN)/dpq convnet compare recipes/convnet-fashion-mnist.yaml
	$(BIN)/dpq convnet compare recipes/convnet-fashion-mnist.yaml --set network.kind=resnet
	$(BIN)/python tests/bench/convnet_latency.py

bench-kernels: $(DEV)  ## linears of the runtimes, checked, then timed beside BF16 and their peers
	$(BIN)/python tests/bench/linears.py

# By the machine's own torch, Triton and pytest: nothing is installed. Wheels of what is missing there
# are unpacked into a folder of PYTHONPATH: see tests/bench/gpu_folder.py.
bench-gpu:  ## everything that wants a Hopper GPU, in one go: kernels checked on it, timed, a model
	$(PYTHON) tests/bench/gpu.py $(GPU_OPTIONS)

bench-throughput: $(RELEASE)  ## prefill and decoding of BF16, FP8, W4A16 and W4A8, on what is here
	$(BIN)/dpq bench $(RECIPE) --shape llama-160m

picture: $(RELEASE)  ## docs/report.png, of a release's report, by headless Chromium
	$(CHROMIUM) --no-sandbox --headless=new --hide-scrollbars --window-size=900,1240 \
		--screenshot=docs/report.png "$$($(BIN)/dpq release $(RECIPE) --json | \
		$(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["report"])')"

system:  ## Debian's packages that some tests and `python -m infra.team` need; as root
	apt-get update
	apt-get install --yes postgresql redis-server chromium

constraints: $(DEV)  ## pin what is installed now
	$(BIN)/pip freeze --all --exclude-editable > constraints.txt

# Of what is installed most is never imported, and compiling all of it is half of the time and a
# sixth of the bytes: only what a release imports is compiled. The rest is kept when it is first
# imported, whatever the environment says. The exit status of pip goes through the pipe.
unexport PYTHONDONTWRITEBYTECODE
IMPORTED := flows.release.release, flows.cli.forecast, flows.reporting.page, flows.cli.terminal, datasets, mlflow, \
	lm_eval.evaluator, lm_eval.models.huggingface, prefect.cli, prefect.server.api.server

define install
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --upgrade pip \
		|| echo "pip stays as it is: it may take three times as long"
	@{ $(BIN)/pip install --no-compile --disable-pip-version-check -c constraints.txt -e "$(1)" 2>&1; \
		echo "pip ended with $$?"; } | awk -f .ci/pip-progress.awk
	@echo "compiling what a release imports"
	@$(BIN)/python -c 'import $(IMPORTED)'
endef

$(RELEASE): pyproject.toml constraints.txt
	$(call install,.)
	touch $@

$(DEV): pyproject.toml constraints.txt
	$(call install,.[dev])
	touch $(RELEASE) $@

clean:
	rm -rf $(VENV) .dpq
