"""What the process that the scripts of the tests are forked from has imported, and looked up, before it forks."""

import atexit
import contextlib
import importlib
import inspect
import io
import os
import shutil
import sys
import tempfile
import threading

MODULES = """
torch._inductor.compile_fx torch.nn.parallel torch_geometric.nn peft transformers.models.bert.modeling_bert
transformers.models.gpt2.modeling_gpt2 tiktoken pytest matplotlib.pyplot scipy.stats sklearn.metrics
sacrebleu.metrics filelock tqdm torch.utils.flop_counter
"""

for name in MODULES.split():
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
for _ in range(3):  # whoever asks for a module's file has those of all modules looked up, which imports some more
    inspect.getmodule(compile('', 'nowhere.py', 'exec'))

with contextlib.suppress(ImportError):  # the first figure looks up fonts, formats, and the modules of a template
    from matplotlib.figure import Figure

    figure = Figure(layout='constrained')
    figure.subplots().plot([0, 1], label='$x^2$')
    for kind in 'png', 'svg':
        figure.savefig(io.BytesIO(), format=kind)
with contextlib.suppress(ImportError):
    from plotly import graph_objects

    graph_objects.Figure(graph_objects.Scatter(x=[0, 1], y=[0, 1]), dict(template='plotly_white')).to_html()
with contextlib.suppress(ImportError), tempfile.TemporaryDirectory() as folder:  # as the first model saved and read
    from transformers import GPT2Config, GPT2Model
    from transformers.utils import logging

    logging.disable_progress_bar()  # which would leave a thread, and a lock that all forks share
    tiny = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8, bos_token_id=None, eos_token_id=None)
    GPT2Model(tiny).save_pretrained(folder)
    GPT2Model.from_pretrained(folder)
    logging.enable_progress_bar()

os.fsync = lambda descriptor: None  # no test is about a machine that crashes

# each script imports the repository's modules anew: the first one compiles them, whatever PYTHONDONTWRITEBYTECODE says
sys.pycache_prefix, sys.dont_write_bytecode = tempfile.mkdtemp(prefix='bytecode'), False
atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)  # when the server ends: a fork ends without it
assert threading.active_count() == 1
