"""A job from Python: rows are written, completed, and read back.

    python jobs/run_in_python.py

`run` also takes the path of a job file, or `Job.load("job.yaml", "generation.n=8")`. With pandas,
`summary.dataset().to_table().to_pandas()` is a table of all samples, and `pandas.DataFrame(rows).to_json("out/rows.jsonl",
orient="records", lines=True)` writes rows.
"""

import json
from pathlib import Path

from tokabatch import run

Path("out").mkdir(exist_ok=True)
rows = [{"question": f"Tom has {n} shells. He buys 7 shells. How many shells does Tom have?"} for n in (12, 30, 45)]
Path("out/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

summary = run(
    {
        "model": {"path": "jobs/quickstart", "dtype": "float32"},
        "input": {"path": "out/rows.jsonl"},
        "prompt": {"template": "Question: {{ question }}\nAnswer:"},
        "generation": {"n": 2, "max_tokens": 64, "stop": ["\n\n"]},
        "output": {"path": "out/in_python"},
    }
)
print(f"{summary.ok} samples, {summary.errors} errors")
for sample in summary.dataset().to_table(columns=["row_index", "text"]).to_pylist():
    print(sample["row_index"], sample["text"].strip().replace("\n", " / "))
