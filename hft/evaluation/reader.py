"""lm-eval's transformers backend, which reads an answer where it stands: behind its prompt."""

from lm_eval.models.huggingface import HFLM


class Reader(HFLM):
    """HFLM with two differences for generation tasks."""

    def tok_decode(self, tokens, skip_special_tokens=True):
        """Text of tokens that follow others: SentencePiece's decoders drop a blank where a text begins."""
        if isinstance(tokens, int):
            return super().tok_decode(tokens, skip_special_tokens)
        before = self.tokenizer.encode("a", add_special_tokens=False)
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        text = self.tokenizer.decode([*before, *tokens], **options)
        return text.removeprefix(self.tokenizer.decode(before, **options))

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The start of an answer as it is given, where templates strip it; open-instruct appends it in the same way."""
        if add_generation_prompt:
            return super().apply_chat_template(chat_history)
        prompt = super().apply_chat_template(chat_history[:-1])
        return prompt + ("" if prompt[-1].isspace() else " ") + chat_history[-1]["content"]
