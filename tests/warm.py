"""What the process that the scripts of the tests are forked from has imported, and looked up, before it forks."""

import atexit
import contextlib
import importlib
import inspect
import os
import shutil
import sys
import tempfile

MODULES = """
torch._inductor.compile_fx torch.nn.parallel torch_geometric.nn peft transformers.models.bert.modeling_bert
transformers.models.gpt2.modeling_gpt2 tiktoken pytest matplotlib.pyplot plotly.io scipy.stats sklearn.metrics
sacrebleu.metrics filelock tqdm
"""

for name in MODULES.split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for _ in range(3):  # whoever asks for a module's file has those of all modules looked up, which imports some more
    inspect.getmodule(compile('', 'nowhere.py', 'exec'))

os.fsync = lambda descriptor: None  # no test is about a machine that crashes

# each script imports the repository's modules anew: the first one compiles them, whatever PYTHONDONTWRITEBYTECODE says
sys.pycache_prefix, sys.dont_write_bytecode = tempfile.mkdtemp(prefix='bytecode'), False
atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)  # when the server ends: a fork ends without it
