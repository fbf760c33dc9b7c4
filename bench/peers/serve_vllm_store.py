"""Parts of bench/peers/serve_vllm.py: how much the pool holds, the store of prefixes, the server and its clients."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve_vllm import DENSE, MODEL, Table, closed, engine, generate, ids, named, same

CONNECTOR = "KVShrinkStore"


def transfer(folder: Path, **settings: Any) -> dict[str, Any]:
    """What an engine is given for a store. "none" keeps rows as they are, so that tokens can be compared."""
    from vllm.config import KVTransferConfig

    extra = {"path": str(folder), **settings}
    own = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both", kv_connector_extra_config=extra)
    return {"kv_transfer_config": own}


def counts() -> dict[str, int]:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    mover = get_kv_transfer_group().mover
    mover.saver.submit(int).result()  # what waits is written
    return dict(mover.store.counts)


# --- how much the pool holds ---


def capacity(table: Table, folder: Path) -> None:
    """Requests of 8k tokens: what vLLM plans, by the form, and by filling the pool until a request must wait."""
    asked = {"dense": None, "turboquant 4": {"method": "turboquant:bits=4", "sinks": 0}}
    asked["spectral 12.5 %"] = {**named("spectral", folder)[0], "sinks": 0}
    first: dict[str, float] = {}
    for name, settings in asked.items():
        llm = engine(settings, dtype="bfloat16", max_model_len=8192, max_num_batched_tokens=128, max_num_seqs=128)
        config = llm.llm_engine.vllm_config.cache_config
        planned, blocks = config.kv_cache_size_tokens, config.num_gpu_blocks
        held = filled(llm, 8192)
        closed(llm)
        first.setdefault("planned", planned), first.setdefault("held", held)
        if settings is not None:
            form = by_form(settings, blocks)
            table.add("capacity", f"{name}: planner's tokens, by the form", (planned, form), "equal", planned == form)
        shares = round(planned / first["planned"], 2), round(held / first["held"], 2)
        least = 7.0 if name.startswith("spectral") else None
        what = f"{name}: tokens that requests of 8k hold, planned and filled"
        table.add(
            "capacity", what, f"{shares} of dense", "" if least is None else "7 or more", least and shares[1] >= least
        )


def by_form(settings: dict[str, Any], blocks: int, length: int = 8192, chunk: int = 128) -> int:
    """docs/serving.md: blocks of a request of so many tokens, from the bytes of a page of each layer."""
    import torch

    from kvshrink.serve.settings import EngineSettings
    from kvshrink.serve.vllm.install import records_for, state_bytes

    records = records_for(Path(MODEL), EngineSettings.of(settings), torch.bfloat16)
    sizes = [state_bytes(part) for part in records.alike for _ in part.layers]
    window_page = 32 * DENSE // len(sizes)
    groups = -(-len(sizes) // max(1, sum(sizes) // window_page))
    ceil = lambda n: -(-n // 32)  # noqa: E731
    one = ceil(length) + groups * (ceil(records.method.window + 31 + chunk) + 1)
    return int(blocks / one * length)


def filled(llm: Any, length: int) -> int:
    """Tokens that requests hold when the first of them must wait: the engine's scheduler, with steps that compute
    nothing."""
    from vllm import SamplingParams
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    own = SamplingParams(max_tokens=length)
    for n in range(100):
        prompt = [n + 1] * (length - 1)
        scheduler.add_request(
            Request(request_id=str(n), prompt_token_ids=prompt, sampling_params=own, pooling_params=None)
        )
    most, idle = 0, 0
    while idle < 20:  # steps without a token more; none generates one, so that all stay as they are
        output = scheduler.schedule()
        names = list(output.num_scheduled_tokens)
        made = ModelRunnerOutput(names, {x: i for i, x in enumerate(names)}, [[] for _ in names])
        scheduler.update_from_output(output, made)
        held = sum(r.num_computed_tokens for r in scheduler.running)
        idle, most = (0, held) if held > most else (idle + 1, most)
    return most


# --- the store of prefixes ---


def store(table: Table, folder: Path) -> None:
    where = folder / "stores"
    shutil.rmtree(where, ignore_errors=True)
    prompts = [ids(1600, 2000 * i) for i in range(2)]
    fitted = named("spectral", folder)[0]["artifact"]
    plain = engine(dtype="bfloat16")
    generate(plain, prompts[:1], 1)
    base = generate(plain, prompts, 24)
    cold = seconds(lambda: generate(plain, prompts, 1))
    closed(plain)
    for name, own, least in (
        ("turboquant 4", {"method": "turboquant:bits=4"}, 0.285),
        ("spectral", {"artifact": fitted}, 0.145),
    ):
        at = where / name.replace(" ", "_")
        llm = engine(dtype="bfloat16", **transfer(at, **own))
        found, wrote = generate(llm, prompts, 24), counts()
        closed(llm)
        table.add("store", f"{name}: tokens of a cold run", same(found, base), "as without it", found == base)
        share = wrote["bytes_written"] / (2 * 1600 * DENSE)
        table.add("store", f"{name}: bytes a token, of dense", round(share, 3), f"{least} or less", share <= least)
        again = other_process("again", at, own)
        ratio = again["seconds"] / cold
        table.add(
            "store",
            f"{name}: after a restart, time to first token of cold",
            round(ratio, 3),
            "0.2 or less",
            ratio <= 0.2,
        )
        table.add("store", f"{name}: tokens equal to cold's", same(again["tokens"], base))
    trials(table, where)


def trials(table: Table, where: Path) -> None:
    """Rows as they are, in float32: what was kept gives the tokens of a run without a store, whatever happens."""
    prompts = [ids(400, 700 * i) for i in range(2)]
    plain = engine()
    want = generate(plain, prompts, 16)
    closed(plain)
    at, own = where / "exact", {"method": "none"}

    def run(what: str, hits: bool | None = None, **more: Any) -> None:
        llm = engine(**transfer(at, **own))
        before = counts()
        found, after = generate(llm, prompts, 16, **more), counts()
        closed(llm)
        met = after["hits"] - before["hits"]
        fine = found == want and (hits is None or (met > 0) == hits)
        table.add("store", what, f"{met} blocks loaded, {same(found, want)}", "right tokens", fine)

    killed = other_process("killed", at, own, wait=False)
    while len(list(at.glob("*/*"))) < 4:  # it is writing
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    run("kill -9 while writing", True)
    run("a second run", True)
    for n, path in enumerate(sorted(at.glob("*/*"))):
        if n % 3 == 0:
            path.write_bytes(path.read_bytes()[: 5000 * (n % 2)])
    run("every third file cut short or empty", True)
    run("cache_salt a", False, cache_salt="a")
    run("cache_salt b", False, cache_salt="b")
    run("cache_salt a again", True, cache_salt="a")
    from kvshrink.serve import prefixes

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    shutil.rmtree(at)
    real, prefixes.os.replace = prefixes.os.replace, full
    run("a full disk", False)
    prefixes.os.replace = real
    run("room again", False)
    own = {"method": "none", "limit": 3_000_000}
    run("a limit of 3 MB")
    size = sum(p.stat().st_size for p in at.glob("*/*"))
    table.add("store", "bytes held under that limit", size, "3000000 or less", size <= 3_000_000)


def seconds(run: Any) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def other_process(what: str, at: Path, own: dict[str, Any], wait: bool = True) -> Any:
    code = f"""
        import json, sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from serve_vllm import engine, generate, ids
        from serve_vllm_store import counts, seconds, transfer
        exact = {what!r} == "killed"
        llm = engine(dtype="float32" if exact else "bfloat16", **transfer({str(at)!r}, **{own!r}))
        prompts = [ids(400, 700 * i) for i in range(2)] if exact else [ids(1600, 2000 * i) for i in range(2)]
        if not exact:
            generate(llm, [ids(1600, 9000)], 1)
            counts()  # what that wrote is written
        took = seconds(lambda: generate(llm, prompts, 1))
        tokens = generate(llm, prompts, 24)
        print(json.dumps({{"seconds": took, "tokens": tokens}}), flush=True)
        llm.llm_engine.engine_core.shutdown()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    if not wait:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


# --- the server ---


def server(table: Table, folder: Path) -> None:
    """vLLM's own server with kvshrink's pages, and with the store, driven by the official client."""
    port = 8123
    pages = ["--additional-config", json.dumps({"kvshrink": {"method": "turboquant:bits=4", "sinks": 0}})]
    extra = {"path": str(folder / "stores" / "server"), "method": "turboquant:bits=4"}
    kept = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    for name, more in (("pages", pages), ("store", ["--kv-transfer-config", json.dumps(kept)])):
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--port", str(port)]
        command += ["--block-size", "32", "--max-model-len", "1024", "--enforce-eager", *more]
        where = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with (folder / f"server_{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=where, start_new_session=True)
        try:
            answered(port, process)
            table.add("server", f"{name}: chat, a stream, 16 clients at once", asked(port), "all answered", True)
        except Exception as error:
            table.add(
                "server",
                f"{name}: chat, a stream, 16 clients at once",
                f"{type(error).__name__}: {error}"[:60],
                "",
                False,
            )
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def answered(port: int, process: subprocess.Popen) -> None:
    """Wait until the server is there."""
    for _ in range(300):
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(1)
    raise RuntimeError("the server did not answer in 300 s")


def asked(port: int) -> str:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0)
    chat: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 16}
    chat["messages"] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    whole = client.chat.completions.create(**chat).choices[0].message.content
    parts = [e.choices[0].delta.content or "" for e in client.chat.completions.create(**chat, stream=True) if e.choices]
    assert "".join(parts) == whole, (parts, whole)

    def complete(n: int) -> str:
        return (
            client.completions.create(model=MODEL, prompt=ids(100 + n, 50 * n), temperature=0, max_tokens=8)
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(complete, range(16)))
    assert all(texts), texts
    return f"{whole!r}, {len(parts)} events, {len(texts)} texts"
