"""Kill a run repeatedly at random moments, and compare it with an undisturbed run.

    python -m benchmarks.random_kills tiny
    python -m benchmarks.random_kills gsm8k --data FOLDER_WITH_GSM8K

`qlora train` is started as a user would start it and gets SIGKILL at a seeded random moment. It is
started again with `--resume auto`, or from scratch if no checkpoint exists yet, and killed again.

- A quarter of the kills come between the start of the process and its first step. Half of these
  repeat the preparation of the data and the unpacking of the model.
- A tenth come after the last step.
- The others come in between, at moments that let the run advance. One comes before the first
  checkpoint.

The console output and the files in the folders show where a kill came.

After each kill, every checkpoint must be complete and equal to the undisturbed run's. At the end,
the weights, the metrics, the record and the names of all files must be equal too, and no temporary
file may remain.

`tiny` trains a random model of two layers. `gsm8k` trains the demo model in NF4 (`--model` for
another) on short rows of GSM8K's train.jsonl and test.jsonl, and also measures the cost of a save.
Updates random_kills.json and random_kills.md in the folder above.
"""
