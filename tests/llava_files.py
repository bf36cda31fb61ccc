"""Small question files of every format that LLaVA's scripts read, about pictures of coloured shapes."""

import base64
import json
from io import BytesIO

from shortv_hf.data import shapes


SHORT = "\nAnswer the question using a single word or phrase."
N = 12
SCENES = list(shapes.held_out_questions(N))
COLUMNS = "index question hint A B C D answer category image source l2-category comment split".split()


def write_files(folder):
    """{format: question file}, all about the pictures in `folder / "images"`."""
    images = folder / "images"
    images.mkdir()
    for number, (scene, _) in enumerate(SCENES):
        shapes.draw(scene, 128).save(images / f"{number}.png")
    texts = [question.text for _, question in SCENES]
    plain = [{"question_id": n, "image": f"{n}.png", "text": text} for n, text in enumerate(texts)]
    rows = {
        "pope": [
            {**row, "text": row["text"] + SHORT, "category": "random" if row["question_id"] % 2 else "popular"}
            for row in plain
        ],
        "gqa": [{**row, "question_id": f"2013{row['question_id']:05}"} for row in plain],
        "textvqa": [
            # ids are those of the pictures: two questions share one
            {**row, "question_id": f"{n // 2:016x}", "text": f"{row['text']}\nReference OCR token: STOP, 7{SHORT}"}
            for n, row in enumerate(plain)
        ],
        "seed": [{**row, "question_id": f"v_{row['question_id']}" if row["question_id"] > 9 else row["question_id"]} for row in plain],
        "mm-vet": plain,
        "vqav2": [{**row, "question_id": 262144000 + row["question_id"]} for row in plain],
    }  # fmt: skip
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    files["sqa"] = folder / "sqa.json"
    files["sqa"].write_text(json.dumps([_sqa(row) for row in plain]))
    for name in ("mmbench", "mmbench-cn"):
        files[name] = folder / f"{name}.tsv"
        files[name].write_text(_tsv(plain, images, "提示" if name == "mmbench-cn" else "a hint"), encoding="utf-8")
    return files


def _sqa(row):
    n = row["question_id"]
    turns = [{"from": "human", "value": f"{row['text']}\n<image>"}, {"from": "gpt", "value": "The answer is A."}]
    return {"id": str(n), **({"image": row["image"]} if n % 3 else {}), "conversations": turns}


def _tsv(rows, images, hint):
    lines = [COLUMNS]
    for row in rows[:6]:
        n = row["question_id"]
        file = BytesIO((images / row["image"]).read_bytes())
        options = [["red", "blue", "2", "left"], ["yes", "no", "", ""], ["one", "None", "three", ""]][n % 3]
        cells = {
            "index": 241 + n,
            "question": row["text"],
            "hint": hint if n % 2 else "",
            "answer": "A",
            "split": "dev",
        }
        cells |= dict(zip("ABCD", options, strict=True)) | {"image": base64.b64encode(file.read()).decode()}
        lines.append([str(cells.get(name, "x")) for name in COLUMNS])
    return "".join("\t".join(line) + "\n" for line in lines)
