"""What the process that the scripts of the tests are forked from has imported, and looked up, before it forks."""

import contextlib
import importlib
import inspect

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
