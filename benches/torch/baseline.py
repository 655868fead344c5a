"""PyTorch/HF/PEFT reference figures for Qwen3-VL-8B LoRA on one GPU, random weights, OpenI-shaped samples.

usage: python3 baseline.py [--layers 36] [--quick]
"""
import argparse, time, json, torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from peft import LoraConfig, get_peft_model

ap = argparse.ArgumentParser()
ap.add_argument("--layers", type=int, default=36)
ap.add_argument("--quick", action="store_true")
ap.add_argument("--compile", action="store_true")
a = ap.parse_args()
torch.manual_seed(0)
dev = "cuda"
cfg = Qwen3VLConfig(
    text_config=dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=a.layers, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, max_position_embeddings=262144,
                     rope_parameters=dict(rope_type="default", rope_theta=5000000.0, mrope_section=[24, 20, 20], mrope_interleaved=True)),
    vision_config=dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096,
                       deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304),
    tie_word_embeddings=False)
torch.set_default_dtype(torch.bfloat16)
t = time.time()
with torch.device(dev):
    model = Qwen3VLForConditionalGeneration(cfg)
torch.set_default_dtype(torch.float32)
model.config._attn_implementation = "sdpa"
print("params", sum(p.numel() for p in model.parameters()) / 1e9, "init s", round(time.time() - t, 1), "attn", model.config._attn_implementation, flush=True)

def batch(b, text=112, hw=(32, 32)):
    nimg = hw[0] * hw[1] // 4
    ids = torch.randint(0, 150000, (b, nimg + text), device=dev)
    ids[:, 4] = 151652; ids[:, 5:5 + nimg] = 151655; ids[:, 5 + nimg] = 151653
    labels = ids.clone(); labels[:, :5 + nimg + 20] = -100
    d = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(b * hw[0] * hw[1], 1536, device=dev, dtype=torch.bfloat16),
                image_grid_thw=torch.tensor([[1, hw[0], hw[1]]] * b, device=dev), labels=labels)
    mm = torch.zeros_like(ids); mm[ids == 151655] = 1
    d["mm_token_type_ids"] = mm
    return d

def sync(): torch.cuda.synchronize()
def med(f, n, warm=2):
    for _ in range(warm): f()
    sync(); v = []
    for _ in range(n):
        s = time.perf_counter(); f(); sync(); v.append(time.perf_counter() - s)
    return sorted(v)[len(v) // 2]

res = {}
model.eval()
with torch.no_grad():
    b1 = batch(1); b1.pop("labels")
    res["prefill_b1_ms"] = 1e3 * med(lambda: model(**b1, logits_to_keep=1), 10)
    vis = lambda: model.model.visual(b1["pixel_values"], b1["image_grid_thw"])
    res["vision_b1_ms"] = 1e3 * med(vis, 10)
    for bs in (1, 8, 32):
        b = batch(bs); b.pop("labels")
        def gen(n): return model.generate(**b, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        t1 = med(lambda: gen(2), 2, 1); t2 = med(lambda: gen(66), 2, 0)
        res[f"decode_b{bs}_tok_s"] = bs * 64 / (t2 - t1)
    print(json.dumps(res), flush=True)
    if a.compile:
        b = batch(1); b.pop("labels")
        def gen(n): return model.generate(**b, max_new_tokens=n, min_new_tokens=n, do_sample=False, cache_implementation="static")
        try:
            t1 = med(lambda: gen(2), 2, 2); t2 = med(lambda: gen(66), 2, 1)
            res["decode_b1_static_compile_tok_s"] = 64 / (t2 - t1)
        except Exception as e: res["static_err"] = repr(e)[:200]
        print(json.dumps(res), flush=True)

model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM",
    target_modules=r"^(model.language_model.*\.(gate_proj|up_proj|v_proj|q_proj|k_proj|down_proj|o_proj))$"))
tr = [p for p in model.parameters() if p.requires_grad]
res["lora_params_M"] = sum(p.numel() for p in tr) / 1e6
opt = torch.optim.AdamW(tr, lr=1e-4)
model.train()
def step(b, acc):
    for _ in range(acc):
        model(**b).loss.backward()
    torch.nn.utils.clip_grad_norm_(tr, 1.0); opt.step(); opt.zero_grad()
for ckpt in (True, False):
    if ckpt:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}); model.enable_input_require_grads()
    else: model.gradient_checkpointing_disable()
    for bs, acc in ((1, 16), (4, 4), (16, 1)):
        try:
            torch.cuda.reset_peak_memory_stats(); b = batch(bs)
            dt = med(lambda: step(b, acc), 3, 1)
            res[f"train_ckpt{int(ckpt)}_b{bs}x{acc}_samples_s"] = bs * acc / dt
            res[f"train_ckpt{int(ckpt)}_b{bs}x{acc}_GiB"] = torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError: res[f"train_ckpt{int(ckpt)}_b{bs}x{acc}"] = "OOM"; torch.cuda.empty_cache()
        print(json.dumps(res), flush=True)
