"""Asks the real gcloud and xpk, where they are installed, whether they know every flag of the golden files.

A flag that does not exist makes either list all that it does not know, before it asks any server. No account is needed.
Run it after a change of the scripts, and with every new gcloud or xpk: `python tests/golden/tpu_setup/check_flags.py`.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile

from cases import commands

wrong = 0
with tempfile.TemporaryDirectory() as directory:
    environment = os.environ | {'CLOUDSDK_CONFIG': directory, 'CLOUDSDK_CORE_DISABLE_PROMPTS': '1'}
    for words in commands():
        if not shutil.which(words[0]):
            print(f'NOT ASKED, {words[0]} is not installed: {" ".join(words[:5])}')
            continue
        done = subprocess.run([*words, '--no-such-flag'], env=environment, capture_output=True, text=True)
        said = (done.stdout + done.stderr).strip()
        known = bool(re.search(r'unrecognized arguments: --no-such-flag( \(did you mean .*\))?\s*$', said, re.M))
        wrong += not known
        print('known' if known else f'UNKNOWN ({said})', ' '.join(words[:5]))
sys.exit(wrong > 0)
