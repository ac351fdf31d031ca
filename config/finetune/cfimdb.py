# The sentiment of film reviews in two classes (CFIMDB). Reviews are long, so batches are accumulated.
#     python finetune.py config/finetune/cfimdb.py config/finetune/lora.py   # or another method

task = 'cfimdb'
batch_size = 8
gradient_accumulation_steps = 4
