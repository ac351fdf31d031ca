# Whether two questions are the same (Quora).
#     python finetune.py config/finetune/quora.py config/finetune/lora.py   # or another method

task = 'quora'
epochs = 5
