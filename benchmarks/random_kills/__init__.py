"""Kill a run at random moments, over and over: does it come to what nobody killed comes to?

    python -m benchmarks.random_kills tiny
    python -m benchmarks.random_kills gsm8k --data FOLDER_WITH_GSM8K

`qlora train` is started as a user starts it and gets SIGKILL at a seeded random moment; then it is
started again with `--resume auto`, or anew where nothing was saved yet, and so on. A quarter of the
kills fall between the start of the process and its first step (half of these while data are
prepared, and the model is unpacked, again), a tenth after the last step, the others anywhere in
between, one of them before the first checkpoint, at moments that let the run advance. Where one
fell is read off what the process had said and what lies in its folders.

After each kill every checkpoint must be whole, and that of the undisturbed run; at the end so must
be the weights, the metrics, the record and the names of all files, and nothing may be left over.

`tiny` is a random model of two layers; `gsm8k` the demo model in NF4 (`--model` names another), on
short rows of train.jsonl and test.jsonl of GSM8K. The latter also measures what a save costs.
Writes its part of random_kills.json, and random_kills.md, beside this folder.
"""
