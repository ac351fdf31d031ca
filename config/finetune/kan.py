# The MLPs become KAN layers that compute what the MLPs did, and all weights train.
#     python finetune.py config/finetune/sst.py config/finetune/kan.py   # or another task

finetune_mode = 'full'
use_lora = False
use_kan = True
learning_rate = 2e-5
