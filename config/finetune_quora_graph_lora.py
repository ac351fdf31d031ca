"""
GPT-2 (124M) learns whether two questions are the same (Quora). LoRA, and graph attention behind the MLPs.

    python finetune.py config/finetune_quora_graph_lora.py
    python finetune.py config/finetune_quora_graph_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-quora-graph-lora'
task = 'quora'
wandb_run_name = 'quora-graph-lora'

use_graph = True
epochs = 5
