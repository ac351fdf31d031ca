"""
GPT-2 (124M) learns the sentiment of film reviews (CFIMDB, two classes). LoRA, and graph attention behind the MLPs.

    python finetune.py config/finetune_cfimdb_graph_lora.py
    python finetune.py config/finetune_cfimdb_graph_lora.py --init_from=gpt2-large   # or out-taskmix, see config/train_taskmix.py

Not run here: it needs GPT-2's weights from the Hugging Face hub. The learning rate is a guess to start from.
"""

out_dir = 'out-finetune-cfimdb-graph-lora'
task = 'cfimdb'
wandb_run_name = 'cfimdb-graph-lora'

use_graph = True
batch_size = 8
gradient_accumulation_steps = 4
