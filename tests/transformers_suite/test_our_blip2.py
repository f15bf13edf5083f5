"""The suites on our BLIP-2."""

import inspect
import unittest
from unittest import mock

import pytest
import transformers
from packaging.version import Version
from transformers import ProcessorMixin

import blip2_hf

from .package import Unavailable


try:
    from . import suites
except Unavailable as reason:
    pytest.skip(str(reason), allow_module_level=True)


class VisionTest(suites.VisionSuite, unittest.TestCase):
    family = blip2_hf


class QFormerTest(suites.QFormerSuite, unittest.TestCase):
    family = blip2_hf


class TrainedInFull:
    """Ours freezes the tower and the language model; the mixin's tests of gradients look at those of every part."""

    def trained_in_full(self):
        return mock.patch.object(self.all_model_classes[0], "freeze", lambda model: model)

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        with self.trained_in_full():
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def test_retain_grad_hidden_states_attentions(self):
        with self.trained_in_full():
            super().test_retain_grad_hidden_states_attentions()

    def test_enable_input_require_grads_with_gradient_checkpointing(self):
        with self.trained_in_full():
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_inputs_embeds(self):
        """As the mixin's, but without pictures: `inputs_embeds` stand in their place too."""
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def prepare_without_pictures():
            config, inputs = prepare()
            return config, {name: value for name, value in inputs.items() if name != "pixel_values"}

        with mock.patch.object(self.model_tester, "prepare_config_and_inputs_for_common", prepare_without_pictures):
            super().test_inputs_embeds()

    def test_model_main_input_name(self):
        """The mixin wants it first in `forward`. There stand pictures, as in transformers; `generate` needs text."""
        model_class = self.all_model_classes[0]
        self.assertEqual(model_class.main_input_name, "input_ids")
        self.assertEqual(list(inspect.signature(model_class.forward).parameters)[1:3], ["pixel_values", "input_ids"])


class DecoderOnlyTest(TrainedInFull, suites.DecoderOnlySuite, unittest.TestCase):
    family = blip2_hf


class EncoderDecoderTest(TrainedInFull, suites.EncoderDecoderSuite, unittest.TestCase):
    family = blip2_hf


class PreTrainingTest(TrainedInFull, suites.PreTrainingSuite, unittest.TestCase):
    family = blip2_hf

    def test_model_main_input_name(self):
        """The mixin wants it first in `forward`. There stand pictures, or their features; a text is always there."""
        self.assertEqual(self.all_model_classes[0].main_input_name, "input_ids")


class RetrievalTest(suites.RetrievalSuite, unittest.TestCase):
    family = blip2_hf


class ProcessorTest(suites.ProcessorSuite, unittest.TestCase):
    family = blip2_hf

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """The mixin compares with the next class, which it takes for ProcessorMixin; ours has another between."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)

    # Our max_length counts the text alone, the mixin's the placeholder too.

    def with_placeholder(self, test, modality):
        equal = self.assertEqual
        with mock.patch.object(self, "assertEqual", lambda length, expected: equal(length, expected + 1)):
            test(modality)

    def _test_unstructured_kwargs(self, modality):
        self.with_placeholder(super()._test_unstructured_kwargs, modality)

    def _test_structured_kwargs_nested_from_dict(self, modality):
        self.with_placeholder(super()._test_structured_kwargs_nested_from_dict, modality)

    def _test_kwargs_overrides_default_modality_processor_kwargs(self, modality):
        self.with_placeholder(super()._test_kwargs_overrides_default_modality_processor_kwargs, modality)

    def _test_modality_processor_defaults_preserved_by_modality_kwargs(self, modality):
        self.with_placeholder(super()._test_modality_processor_defaults_preserved_by_modality_kwargs, modality)

    def test_processor_text_has_no_visual(self):
        if Version(transformers.__version__) < Version("5.24"):
            self.skipTest("it gives each text a list of videos, which only a processor with a video processor takes")
        super().test_processor_text_has_no_visual()

    @unittest.skip("its template takes content in parts; ours takes text, as language models' templates do")
    def test_apply_chat_template_assistant_mask(self):
        pass

    @unittest.skip("its template takes content in parts; ours takes text, as language models' templates do")
    def test_chat_template_jinja_kwargs(self):
        pass

    @unittest.skip("its template takes content in parts; test_processing.py gives objects to one of text")
    def test_chat_template_message_objects(self):
        pass


class ChatProcessorTest(ProcessorTest):
    """With a language model that has a chat template, which is a template of plain text."""

    @staticmethod
    def _setup_tokenizer():
        tokenizer = suites.tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}"
            "{% if not loop.last or message['role'] == 'user' %}</s>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
        return tokenizer
