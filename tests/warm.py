"""What the process that the scripts of the tests are forked from has imported, and looked up, before it forks."""

import inspect

import filelock  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import plotly.io  # noqa: F401
import pytest  # noqa: F401
import sacrebleu.metrics  # noqa: F401
import scipy.stats  # noqa: F401
import sklearn.metrics  # noqa: F401
import tiktoken  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401
import torch.nn.parallel  # noqa: F401
import torch_geometric.nn  # noqa: F401
import tqdm  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401
import transformers.models.gpt2.modeling_gpt2  # noqa: F401

for _ in range(3):  # whoever asks for a module's file has those of all modules looked up, which imports some more
    inspect.getmodule(compile('', 'nowhere.py', 'exec'))
