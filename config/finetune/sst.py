# The sentiment of film reviews in five classes (Stanford Sentiment Treebank).
#     python finetune.py config/finetune/sst.py config/finetune/lora.py   # or another method

task = 'sst'
