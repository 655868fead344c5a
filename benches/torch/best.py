"""The strongest plain-PyTorch settings found for the same work as baseline.py: larger micro-batches without
checkpointing, and greedy decode with a static cache under torch.compile (CUDA graphs). Random 8B weights, one GPU.

usage: python3 best.py
"""
import json, time, torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
dev = "cuda"
cfg = Qwen3VLConfig(
    text_config=dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
                     num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, max_position_embeddings=262144,
                     rope_parameters=dict(rope_type="default", rope_theta=5000000.0, mrope_section=[24, 20, 20], mrope_interleaved=True)),
    vision_config=dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096,
                       deepstack_visual_indexes=[8, 16, 24], num_position_embeddings=2304),
    tie_word_embeddings=False)
torch.set_default_dtype(torch.bfloat16)
with torch.device(dev):
    model = Qwen3VLForConditionalGeneration(cfg)
torch.set_default_dtype(torch.float32)
res = {}

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

def med(f, n, warm):
    for _ in range(warm): f()
    torch.cuda.synchronize(); v = []
    for _ in range(n):
        s = time.perf_counter(); f(); torch.cuda.synchronize(); v.append(time.perf_counter() - s)
    return sorted(v)[len(v) // 2]

lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, task_type="CAUSAL_LM",
    target_modules=r"^(model.language_model.*\.(gate_proj|up_proj|v_proj|q_proj|k_proj|down_proj|o_proj))$"))
tr = [p for p in lora.parameters() if p.requires_grad]
opt = torch.optim.AdamW(tr, lr=1e-4, fused=True)
lora.train()
def step(b, acc):
    for _ in range(acc):
        lora(**b).loss.backward()
    torch.nn.utils.clip_grad_norm_(tr, 1.0); opt.step(); opt.zero_grad()
for bs, acc in ((4, 4), (6, 3), (8, 2)):
    try:
        torch.cuda.reset_peak_memory_stats(); b = batch(bs)
        res[f"train_nockpt_b{bs}x{acc}_samples_s"] = bs * acc / med(lambda: step(b, acc), 3, 1)
        res[f"train_nockpt_b{bs}x{acc}_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    except torch.OutOfMemoryError:
        res[f"train_nockpt_b{bs}x{acc}"] = "OOM"; opt.zero_grad(); torch.cuda.empty_cache()
    print(json.dumps(res), flush=True)
model = lora.merge_and_unload(); model.eval()
lm = model.model.language_model
with torch.no_grad():
    # decode step alone: one token through text tower + head with a static KV cache, compiled with CUDA graphs
    from transformers import StaticCache
    for bs in (1, 32):
        try:
            torch.compiler.reset(); L = 512
            cache = StaticCache(config=cfg.text_config, max_cache_len=L)
            emb = torch.randn(bs, 368, 4096, device=dev, dtype=torch.bfloat16) * 0.02
            pos = torch.arange(368, device=dev)[None, None].expand(3, bs, -1)
            lm(inputs_embeds=emb, position_ids=pos, past_key_values=cache, use_cache=True)
            def one(e, p):
                return model.lm_head(lm(inputs_embeds=e, position_ids=p, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]).argmax(-1)
            fast = torch.compile(one, mode="reduce-overhead", fullgraph=False)
            e1 = emb[:, :1].clone(); p1 = torch.full((3, bs, 1), 368, device=dev)
            s = time.time(); fast(e1, p1); fast(e1, p1); torch.cuda.synchronize(); res[f"decode_b{bs}_compile_s"] = time.time() - s
            res[f"decode_b{bs}_compiled_tok_s"] = bs / med(lambda: fast(e1, p1), 20, 5)
            res[f"decode_b{bs}_eager_static_tok_s"] = bs / med(lambda: one(e1, p1), 5, 1)
        except Exception as ex:
            res[f"decode_b{bs}_compiled_error"] = repr(ex)[:300]
        print(json.dumps(res), flush=True)
