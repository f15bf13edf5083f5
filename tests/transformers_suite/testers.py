"""Tiny configs and inputs. `family` is the module whose classes are meant: blip2_hf or transformers."""

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CONFIG_MAPPING, BlipImageProcessorPil, GPT2Tokenizer

from .package import load


common = load("test_modeling_common")
floats_tensor, ids_tensor = common.floats_tensor, common.ids_tensor

# The mixin fills smaller batches than 7 up with random ids, placeholders among them
BATCH, QUERIES, IMAGE_TOKEN = 7, 10, 4


class VisionTester:
    """14-pixel pictures in patches of 2: 49 patches and the class token."""

    is_training = True
    batch_size, image_size, patch_size, num_channels = BATCH, 14, 2, 3
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    seq_length = (image_size // patch_size) ** 2 + 1

    def __init__(self, parent, family):
        self.parent, self.family = parent, family

    def get_config(self):
        return self.family.Blip2VisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            attention_dropout=0.1,
            initializer_range=0.02,  # transformers' 1e-10 would make every comparison one of zeros
        )

    def prepare_config_and_inputs_for_common(self):
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        return self.get_config(), {"pixel_values": pixels}


class QFormerTester:
    """Queries alone, over the features of a tower."""

    is_training = True
    batch_size, seq_length = BATCH, QUERIES
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size = 32, 2, 4, 37
    encoder_seq_length, encoder_hidden_size = QUERIES, 24  # the mixin's name for the length that attends

    def __init__(self, parent, family):
        self.parent, self.family = parent, family

    def get_config(self, **kwargs):
        return self.family.Blip2QFormerConfig(
            vocab_size=99,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            encoder_hidden_size=self.encoder_hidden_size,
            max_position_embeddings=64,
            initializer_range=0.02,
            **kwargs,
        )

    def prepare_config_and_inputs_for_common(self):
        queries = floats_tensor([self.batch_size, self.seq_length, self.hidden_size])
        features = floats_tensor([self.batch_size, 17, self.encoder_hidden_size])
        mask = torch.ones(queries.shape[:2], dtype=torch.long, device=queries.device)
        inputs = {"query_embeds": queries, "attention_mask": mask, "encoder_hidden_states": features}
        return self.get_config(), inputs


class DecoderOnlyTester:
    """OPT: placeholders of the queries, then the text."""

    is_training = True
    batch_size, text_length, vocab_size = BATCH, 7, 99
    seq_length = QUERIES + text_length
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 16

    def __init__(self, parent, family):
        self.parent, self.family = parent, family
        self.vision_model_tester = VisionTester(parent, family)
        self.qformer_model_tester = QFormerTester(parent, family)
        self.text_model_tester = self

    def get_text_config(self):
        return CONFIG_MAPPING["opt"](
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            word_embed_proj_dim=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            ffn_dim=4,
            max_position_embeddings=512,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )

    def get_config(self):
        return self.family.Blip2Config(
            vision_config=self.vision_model_tester.get_config(),
            qformer_config=self.qformer_model_tester.get_config(),
            text_config=self.get_text_config(),
            num_query_tokens=QUERIES,
            image_token_index=IMAGE_TOKEN,
        )

    def prepare_image_and_text(self):
        _, vision_inputs = self.vision_model_tester.prepare_config_and_inputs_for_common()
        text = ids_tensor([self.batch_size, self.text_length], self.vocab_size).clamp(IMAGE_TOKEN + 1)
        input_ids = torch.cat([torch.full((self.batch_size, QUERIES), IMAGE_TOKEN, device=text.device), text], dim=1)
        return {**vision_inputs, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.prepare_image_and_text()


class PreTrainingTester:
    """Pictures, and a text for each."""

    is_training = True
    batch_size, text_length = BATCH, 7
    seq_length = QUERIES + 2 * text_length
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, parent, family):
        self.parent, self.family = parent, family
        self.vision_model_tester = VisionTester(parent, family)
        self.qformer_model_tester = QFormerTester(parent, family)

    def get_config(self):
        return self.family.Blip2Config(
            vision_config=self.vision_model_tester.get_config(),
            qformer_config=self.qformer_model_tester.get_config(use_qformer_text_input=True, bos_token_id=98),
            num_query_tokens=QUERIES,
            image_text_hidden_size=16,
        )

    def prepare_config_and_inputs_for_common(self):
        _, vision_inputs = self.vision_model_tester.prepare_config_and_inputs_for_common()
        text = ids_tensor([self.batch_size, self.text_length], 98)
        return self.get_config(), {**vision_inputs, "input_ids": text, "attention_mask": torch.ones_like(text)}


class EncoderDecoderTester(DecoderOnlyTester):
    """T5: placeholders and text to the encoder, the answer to the decoder."""

    decoder_length = 9
    seq_length = decoder_length  # the mixin makes labels of this length
    encoder_seq_length = QUERIES + DecoderOnlyTester.text_length
    num_hidden_states_types = 2  # the encoder's and the decoder's
    hidden_size = 32

    def get_text_config(self):
        return CONFIG_MAPPING["t5"](
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_kv=self.hidden_size // self.num_attention_heads,
            d_ff=37,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            relative_attention_num_buckets=8,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )

    def prepare_config_and_inputs_for_common(self):
        answer = ids_tensor([self.batch_size, self.decoder_length], self.vocab_size)
        decoder = {"decoder_input_ids": answer, "decoder_attention_mask": torch.ones_like(answer)}
        return self.get_config(), {**self.prepare_image_and_text(), **decoder}


def tiny_tokenizer():
    """Bytes, as GPT-2 and OPT spell them."""
    vocabulary = [*sorted(ByteLevel.alphabet()), "<s>", "</s>", "<pad>"]
    return GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[],
        unk_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def tiny_image_processor():
    return BlipImageProcessorPil(size={"height": 20, "width": 20})
