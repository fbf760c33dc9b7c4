"""One model held in many ways (PEFT, compiled, parallel, a pipeline, a copy, a shared config) has one attachment."""

import copy
import json
import pickle
import sys
import threading

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from transformers import DynamicCache

import kvshrink
from kvshrink import CSKV, RTN
from kvshrink.attach import hook
from kvshrink.attach.attention import NAME
from kvshrink.attach.hook import LIVE
from kvshrink.errors import SettingError, UnsupportedModelError
from tests.attach.test_attach import hooks, logits, untouched
from tests.scenarios.families import FAMILIES
from tests.scenarios.scenarios import generate, tokens

pytestmark = [  # of PEFT, about itself
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

METHOD = RTN(bits=None, window=8)
LORA = {"r": 4, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False}


@pytest.fixture
def model() -> hf.PreTrainedModel:
    return FAMILIES["llama"].build()


def right(model) -> bool:
    """Whether a lossless cache gives the tokens of a full one."""
    ids = tokens(1, 60)
    wanted = generate(model, ids, DynamicCache(config=model.config))
    return torch.equal(generate(model, ids, kvshrink.make_cache(model, METHOD)), wanted)


class Holder(nn.Module):
    """A user's own module around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inside = model


# --- wrappers ---


@pytest.mark.parametrize(
    ("attach_at", "detach_at"), [("base", "wrapper"), ("wrapper", "base"), ("decoder", "wrapper"), ("base", "decoder")]
)
def test_a_peft_wrapper_and_its_base_are_one(model, attach_at, detach_at):
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    held = {"base": wrapper.get_base_model(), "wrapper": wrapper, "decoder": model.model}
    first = kvshrink.attach(held[attach_at])
    count = hooks(model)
    assert all(kvshrink.attach(x) is first for x in held.values())
    assert hooks(model) == count
    assert right(wrapper)
    assert right(held["base"])
    kvshrink.detach(held[detach_at])
    assert untouched(wrapper)


@pytest.mark.parametrize("attached_first", [False, True])
def test_a_merged_model_is_its_base(model, attached_first):
    if attached_first:
        kvshrink.attach(model)
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    kvshrink.make_cache(wrapper, METHOD)
    merged = wrapper.merge_and_unload()
    assert right(merged)
    assert hooks(merged) == len(merged.model.layers) + 3
    kvshrink.detach(wrapper)
    assert untouched(merged)
    assert right(merged)


def test_wrappers_may_be_nested(model):
    inner = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    outer = Holder(nn.DataParallel(peft.PeftModel(inner, peft.LoraConfig(**LORA), "second"))).eval()
    attachment = kvshrink.attach(outer)
    assert kvshrink.attach(torch.compile(model, backend="eager")) is attachment
    with kvshrink.attached(inner) as same:
        assert same is inner
    assert right(model)
    kvshrink.detach(outer)
    assert untouched(model)


def test_a_pipeline_stands_for_its_model(model):
    pipe = hf.TextGenerationPipeline(model=model, tokenizer=kvshrink.reference_model()[1])
    cache = kvshrink.make_cache(pipe, METHOD)
    assert cache.get_seq_length() == 0
    assert kvshrink.attach(model) is kvshrink.attach(pipe)
    kvshrink.detach(pipe)
    assert untouched(model)
    artifact = kvshrink.fit(pipe, CSKV(keep=0.5, window=8), tokens(4, 64), progress=False)
    kvshrink.make_cache(pipe, artifact)


@pytest.mark.parametrize("given", ["reference", None, 3, nn.Linear(2, 2), [], RTN()], ids=lambda x: type(x).__name__)
def test_what_is_no_model_is_refused(given):
    uses = [kvshrink.attach, kvshrink.detach, lambda x: kvshrink.make_cache(x, METHOD)]
    uses.append(lambda x: kvshrink.attached(x).__enter__())
    if not isinstance(given, str):  # a name for fit
        uses.append(lambda x: kvshrink.fit(x, CSKV(), tokens(4, 64)))
    for use in uses:
        with pytest.raises(SettingError, match="model") as error:
            use(given)
        assert "\n" not in str(error.value)


def test_two_models_in_one_module_are_refused(model):
    with pytest.raises(SettingError, match="holds 2 transformers models"):
        kvshrink.attach(nn.ModuleList([model, FAMILIES["qwen3"].build()]))


@pytest.mark.parametrize("method", ["cskv", None, [CSKV()], CSKV], ids=str)
def test_what_is_no_method_is_refused(model, method):
    for use in (lambda: kvshrink.make_cache(model, method), lambda: kvshrink.fit(model, method, tokens(4, 64))):
        with pytest.raises(SettingError, match="Pass an object, such as"):
            use()
    assert untouched(model)


def test_prefix_tuning_is_refused_and_prompt_tuning_is_right(model):
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    wrapper = peft.get_peft_model(copy.deepcopy(model), peft.PrefixTuningConfig(**settings))
    with pytest.raises(UnsupportedModelError, match="PREFIX_TUNING passes a cache of its own"):
        kvshrink.make_cache(wrapper, METHOD)
    wrapper = peft.get_peft_model(model, peft.PromptTuningConfig(**settings)).eval()
    ids = tokens(1, 60)

    def run(cache) -> list:
        mask = torch.ones_like(ids)
        return wrapper.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False
        ).tolist()

    wanted = run(DynamicCache(config=model.config))
    cache = kvshrink.make_cache(wrapper, METHOD)
    assert run(cache) == wanted
    assert cache.get_seq_length() == 60 + 5 + 11


# --- one config, copies, files ---


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_two_models_of_one_config(model, first, implementation):
    """Each goes on as it was while the other is attached, and the last to be detached restores the config."""
    model.set_attn_implementation(implementation)
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert other.config is model.config
    ids, both = tokens(1, 60), [model, other]
    before = logits(other, DynamicCache(config=other.config), ids)
    kvshrink.attach(model)
    assert torch.equal(logits(other, DynamicCache(config=other.config), ids), before)
    kvshrink.attach(other)
    assert right(model)
    assert right(other)
    kvshrink.detach(both[first])
    assert model.config._attn_implementation == NAME
    assert torch.equal(logits(both[first], DynamicCache(config=other.config), ids), before)
    assert right(both[1 - first])
    kvshrink.detach(both[1 - first])
    assert untouched(model, implementation)
    assert untouched(other, implementation)
    kvshrink.detach(model)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_made_from_the_config_of_an_attached_one(model, implementation):
    model.set_attn_implementation(implementation)
    kvshrink.attach(model)
    copied = type(model)(copy.deepcopy(model.config)).eval()
    derived = hf.AutoModelForCausalLM.from_config(model.config).eval()
    kvshrink.detach(model)
    for new in (copied, derived):
        assert not hooks(new)
        assert right(new)
        kvshrink.detach(new)
        assert untouched(new, implementation)


def test_a_model_whose_config_only_says_our_name(model):
    kvshrink.attach(model)
    kvshrink.detach(model)
    model.set_attn_implementation(NAME)
    assert right(model)
    kvshrink.detach(model)
    assert untouched(model)


def test_a_copy_is_detached_by_itself(model):
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    kvshrink.attach(wrapper)
    twin = copy.deepcopy(wrapper)
    kvshrink.detach(twin)
    assert untouched(twin)
    assert right(twin)
    assert right(wrapper)
    assert hooks(wrapper) == hooks(twin)
    kvshrink.detach(wrapper)
    assert untouched(wrapper)
    assert right(twin)


def test_a_pickled_model_stays_attached(model):
    kvshrink.attach(model)
    count, twin = hooks(model), pickle.loads(pickle.dumps(model))
    assert hooks(twin) == count
    assert right(twin)
    kvshrink.detach(twin)
    assert untouched(twin)
    assert right(model)


def test_saved_files_do_not_name_us(model, tmp_path):
    kvshrink.attach(model)
    model.save_pretrained(tmp_path)
    assert NAME not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert NAME not in model.config.to_json_string()
    again = type(model).from_pretrained(tmp_path)
    assert untouched(again)


@pytest.mark.parametrize("copied", [False, True])
def test_layers_that_were_replaced_are_attached_anew(model, copied):
    kvshrink.attach(model)
    kept = model.model.layers[:1]
    model.model.layers = copy.deepcopy(kept) if copied else kept
    model.config.num_hidden_layers, model.config.layer_types = 1, ["full_attention"]
    assert right(model)
    kvshrink.detach(model)
    assert untouched(model)


def test_an_attached_model_is_freed(model):
    kvshrink.attach(model)
    count = len(LIVE)
    del model
    # the fixture holds it still; another one nobody holds
    other = FAMILIES["llama"].build()
    kvshrink.attach(other)
    del other
    assert len(LIVE) == count


# --- failures leave all as it was ---


def test_a_failed_attach_changes_nothing(model, monkeypatch):
    kvshrink.attach(model)
    config = model.config
    other = type(model)(config).eval()
    monkeypatch.setattr(hook, "check_layers", lambda *_: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
        kvshrink.attach(other)
    assert not hooks(other)
    assert right(model)
    monkeypatch.undo()
    monkeypatch.setattr(hook, "choose", lambda *_: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="ZeroDivisionError"):
        kvshrink.attach(other)
    monkeypatch.undo()
    assert not hooks(other)
    assert right(model)
    kvshrink.detach(model)
    assert untouched(model)


def test_an_interrupted_attach_changes_nothing(model, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(hook, "choose", interrupt)
    with pytest.raises(KeyboardInterrupt):
        kvshrink.attach(model)
    assert untouched(model)


# --- threads ---


def in_threads(count: int, work) -> list:
    """What each thread's call gave, or the error it raised."""
    barrier, found = threading.Barrier(count), [None] * count

    def run(i: int) -> None:
        barrier.wait()
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        sys.setswitchinterval(interval)
    return found


def test_threads_attach_one_model_once(model):
    wrapper = peft.get_peft_model(model, peft.LoraConfig(**LORA)).eval()
    held = [model, wrapper, model.model]
    for _ in range(3):
        found = in_threads(6, lambda i: kvshrink.attach(held[i % 3]))
        assert len({id(x) for x in found}) == 1
        assert hooks(model) == len(model.model.layers) + 3
        kvshrink.detach(wrapper)
        assert untouched(model)


def test_threads_may_attach_and_detach_at_once(model):
    other = type(model)(model.config).eval()

    def work(i: int) -> None:
        each = (model, other)[i % 2]
        for _ in range(3):
            kvshrink.make_cache(each, METHOD)
            kvshrink.detach(each)

    assert in_threads(4, work) == [None] * 4
    assert untouched(model)
    assert untouched(other)


def test_blocks_of_threads_end_with_the_last(model):
    entered, left = threading.Event(), threading.Event()

    def short() -> None:
        with kvshrink.attached(model):
            entered.set()
            left.wait()

    thread = threading.Thread(target=short)
    thread.start()
    entered.wait()
    with kvshrink.attached(model):
        left.set()
        thread.join()
        assert right(model)
    assert untouched(model)


def test_a_model_that_unpacks_its_weights_when_it_first_runs(model):
    """As compressed-tensors does it."""
    packed = {m: m._parameters.pop("weight") for m in model.model.modules() if isinstance(m, nn.Linear)}

    def unpack(module, args, kwargs):
        for linear, weight in packed.items():
            linear._parameters["weight"] = weight
        first.remove()

    first = model.model.register_forward_pre_hook(unpack, with_kwargs=True)
    kvshrink.attach(model)
    assert right(model)
