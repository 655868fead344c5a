"""Adapters written by PEFT through `serve`, against transformers: python3 tests/clients/compare_peft.py

Each row is an adapter or checkpoint: whether the answer is the same, the largest difference of the
log-probabilities of the 20 most probable tokens, and how far the adapter itself moves those of the
first token, so that a row whose adapter does nothing shows. Packages are installed into a temporary
environment first (some GB); PEFT_PYTHON names a Python that has them. XRAY_SERVER names a program other
than target/release/xray-qwen3vl.
"""

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import warnings

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PROGRAM = os.environ.get("XRAY_SERVER", str(ROOT / "target/release/xray-qwen3vl"))
MODEL = ROOT / "model/tiny"
FILM = ROOT / "data/sample/demo.png"
QUESTION = "这张胸片有什么异常？"
TOKENS = 12
TOP = 20
# Rounding of float32 in another order is some 1e-5.
LARGEST_DIFFERENCE = 1e-3


def with_packages():
    """Starts this script again with a Python that has the packages."""
    python = os.environ.get("PEFT_PYTHON")
    if python is None:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = f"{folder}/bin/python"
            install = ["-m", "pip", "install", "--quiet", "--requirement"]
            subprocess.run([python, *install, HERE / "compare_peft.txt"], check=True)
            return run_with(python)
    return run_with(python)


def run_with(python):
    return subprocess.run([python, __file__], env={**os.environ, "PEFT_CHILD": "1"}).returncode


def serve_answer(model, adapter):
    """The tokens of the program's answer, each with its log-probabilities, or its refusal."""
    command = [PROGRAM, "serve", "--device", "cpu", "--port", "0", "--model", str(model)]
    if adapter is not None:
        command += ["--adapter", str(adapter)]
    log = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            for line in server.stderr:
                log.append(line)
                if found := re.search(r"the API at (http://\S+/v1)", line):
                    return ask(found.group(1)), None
        finally:
            server.terminate()
    return None, "".join(log).strip()


def ask(url):
    film = base64.b64encode(FILM.read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{film}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "logprobs": True,
        "top_logprobs": TOP,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["logprobs"]["content"]


class Reference:
    """transformers and PEFT on the CPU in float32."""

    def __init__(self):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.filterwarnings("ignore")
        self.processor = transformers.AutoProcessor.from_pretrained(MODEL)
        self.first = self.answer(self.base())[1][0]

    def base(self, model=MODEL):
        import torch
        from transformers import Qwen3VLForConditionalGeneration

        torch.manual_seed(7)
        return Qwen3VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()

    def answer(self, model):
        """Tokens of the greedy answer, and the log-probabilities before each."""
        import torch
        from PIL import Image

        parts = [{"type": "image", "image": Image.open(FILM)}, {"type": "text", "text": QUESTION}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, [torch.log_softmax(step[0].float(), -1) for step in out.logits]

    def bytes_of(self, token):
        """The bytes of a token; the program tells tokens by these."""
        text = self.processor.tokenizer.convert_ids_to_tokens(token)
        return bytes(BYTES[c] for c in text) if all(c in BYTES for c in text) else text.encode()


def byte_table():
    """Characters of a byte-level vocabulary to bytes; GPT-2's `bytes_to_unicode`, turned round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = byte_table()


def adapted(reference, folder, **settings):
    """A base with a random adapter of `settings`, saved to `folder`."""
    import peft
    import torch

    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "up_proj"]} | settings
    model = peft.get_peft_model(reference.base(), peft.LoraConfig(**settings)).eval()
    is_pissa = settings.get("init_lora_weights") == "pissa"
    if is_pissa:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "initial")
        model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += torch.randn_like(weight) * 0.05
            elif "magnitude" in name:
                weight *= 1 + 0.1 * torch.rand_like(weight)
            elif weight.requires_grad and "lora_" not in name:
                weight += torch.randn_like(weight) * 0.02
    model.save_pretrained(folder / "adapter")
    if is_pissa:
        model.save_pretrained(
            folder / "converted", path_initial_model_for_weight_conversion=str(folder / "initial")
        )
    return model


def compare(reference, name, model, folder, adapter):
    answer, refusal = serve_answer(folder, adapter)
    if answer is None:
        return name, f"refused: {refusal.splitlines()[-1]}", None, 0.0
    tokens, steps = reference.answer(model)
    ids = {}
    for token in range(steps[0].shape[0]):
        ids.setdefault(reference.bytes_of(token), token)
    largest, same = 0.0, True
    for entry, token, step in zip(answer, tokens, steps):
        for candidate in entry["top_logprobs"]:
            one = ids.get(bytes(candidate["bytes"] or candidate["token"].encode()))
            if one is not None:
                largest = max(largest, abs(step[one].item() - candidate["logprob"]))
        if bytes(entry["bytes"] or entry["token"].encode()) != reference.bytes_of(token):
            same = False
            break
    effect = (steps[0] - reference.first).abs().max().item()
    return name, "same text" if same else "other text", largest, effect


def rows(reference, folder):
    yield compare(reference, "no adapter", reference.base(), MODEL, None)
    for name, settings in {
        "plain LoRA": {},
        "rsLoRA": {"use_rslora": True},
        "DoRA": {"use_dora": True},
        "rsLoRA and DoRA": {"use_rslora": True, "use_dora": True},
        "all linear layers": {"target_modules": "all-linear"},
        "targets by regex": {"target_modules": r".*language_model.*\.(q_proj|o_proj|down_proj)"},
        "vision tower": {"target_modules": r".*visual\.blocks.*\.(qkv|proj)"},
        "ranks by pattern": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},
        "alpha 16.5": {"lora_alpha": 16.5},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "embedding, tied on": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
        "names end in proj": {"target_modules": ["q_proj", "proj"]},
        "biases of layers": {"target_modules": r".*visual.*\.(qkv|linear_fc1)", "bias": "lora_only"},
        "all biases": {"bias": "all"},
        "biases of B": {"lora_bias": True},
        "head stored whole": {"modules_to_save": ["lm_head"]},
        "merger, norms whole": {"modules_to_save": ["visual.merger", "layernorm"]},
        "rows of tokens": {"trainable_token_indices": [5, 17, 300]},
    }.items():
        own = folder / name.replace(" ", "-")
        model = adapted(reference, own, **settings)
        yield compare(reference, name, model, MODEL, own / "adapter")
    own = folder / "pissa"
    model = adapted(reference, own, init_lora_weights="pissa")
    _, verdict, *_ = compare(reference, "", model, MODEL, own / "adapter")
    is_right = "refused" in verdict and "init_lora_weights" in verdict
    verdict = verdict if is_right else "taken, expected a refusal that names init_lora_weights"
    yield "PiSSA, not converted", verdict, 0.0 if is_right else float("inf"), 0.0
    yield compare(reference, "PiSSA, converted", model, MODEL, own / "converted")
    shutil.copytree(own / "initial", own / "pissa_init")
    yield compare(reference, "PiSSA and its start", model, MODEL, own / "adapter")
    yield other_head(reference, folder / "other-head")


def other_head(reference, folder):
    """A tied configuration beside another head in the file, which transformers takes."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    embedding = next(weights[name] for name in weights if name.endswith("embed_tokens.weight"))
    torch.manual_seed(3)
    weights["lm_head.weight"] = embedding + torch.randn_like(embedding) * 0.02
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return compare(reference, "tied, other head", reference.base(folder), folder, None)


def main():
    if "PEFT_CHILD" not in os.environ:
        return with_packages()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, verdict, largest, effect in rows(Reference(), pathlib.Path(folder)):
            shown = f"differs by {largest:.1e}, moved by {effect:.1e}" if "text" in verdict else ""
            print(f"{name:22} {verdict:12} {shown}", flush=True)
            failed += largest is None or largest > LARGEST_DIFFERENCE or verdict == "other text"
    print(f"{failed} rows differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
