"""Kill a run at random moments, over and over, and compare it with an undisturbed run.

    python -m benchmarks.random_kills tiny
    python -m benchmarks.random_kills gsm8k --data FOLDER_WITH_GSM8K

`qlora train` gets SIGKILL at a seeded random moment. It is then started again with `--resume auto`,
or from scratch if nothing was saved yet, and so on. A quarter of the kills fall before the first
step (half of these during data preparation and unpacking of the model), a tenth after the last
step, and the others in between, one of them before the first checkpoint, at moments that let the
run advance. The log and the files show where a kill fell.

After each kill, every checkpoint must be intact and equal to that of the undisturbed run. At the
end the same holds for weights, metrics, record and the names of all files, and nothing may be left
over.

`tiny` is a random two-layer model; `gsm8k` is the demo model in NF4 (`--model` names another) on
short rows of train.jsonl and test.jsonl of GSM8K, and also measures the cost of a save. Writes its
part of random_kills.json, and random_kills.md, next to this folder.
"""
