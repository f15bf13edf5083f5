"""transformers' mixins, with what BLIP-2's shape needs changed; each change says why."""

import inspect
import unittest
from unittest import mock

import torch
import transformers

from .package import load
from .testers import (
    DecoderOnlyTester,
    EncoderDecoderTester,
    PreTrainingTester,
    QFormerTester,
    VisionTester,
    tiny_image_processor,
    tiny_tokenizer,
)


modeling = load("test_modeling_common")
ProcessorTesterMixin = load("test_processing_common").ProcessorTesterMixin
ConfigTester = load("test_configuration_common").ConfigTester


class Suite(modeling.ModelTesterMixin):
    """`family` is the module whose classes are tested: blip2_hf or transformers."""

    family = None

    def setUp(self):
        self.model_tester = self.tiny(self, self.family)
        self.all_model_classes = (getattr(self.family, self.model),)

    def test_can_init_all_missing_weights(self):
        """The mixin leaves out models that are old by the copyright line of their configuration's file."""
        dated = mock.Mock(wraps=inspect, getfile=lambda _: inspect.getfile(transformers.Blip2Config))
        with mock.patch.object(modeling, "inspect", dated):
            super().test_can_init_all_missing_weights()


class FeatureSuite(Suite):
    """Models that return features and have no loss of their own."""

    test_resize_embeddings = False  # nothing to resize: pictures and query vectors come in

    def with_loss(self, model_class):
        """The mixin trains on `outputs.loss`, and leaves out what it knows for a base model by its name."""

        def forward(model, *args, labels=None, **kwargs):
            outputs = model_class.forward(model, *args, **kwargs)
            outputs["loss"] = outputs.last_hidden_state.pow(2).mean() + outputs.pooler_output.pow(2).mean()
            return outputs

        return type(f"{model_class.__name__}WithLoss", (model_class,), {"forward": forward})

    def test_training(self):
        self.all_model_classes = tuple(self.with_loss(model_class) for model_class in self.all_model_classes)
        super().test_training()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        self.all_model_classes = tuple(self.with_loss(model_class) for model_class in self.all_model_classes)
        super().check_training_gradient_checkpointing(*args, **kwargs)


class VisionSuite(FeatureSuite):
    tiny, model = VisionTester, "Blip2VisionModel"

    def test_model_get_set_embeddings(self):
        """As the mixin's, but what embeds patches is no `nn.Embedding`, and nothing else fits in its place."""
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsNone(model.get_output_embeddings())

    def test_config(self):
        ConfigTester(self, self.family.Blip2VisionConfig, has_text_modality=False, hidden_size=37).run_common_tests()


class QFormerSuite(FeatureSuite):
    tiny, model = QFormerTester, "Blip2QFormerModel"
    additional_model_inputs = ["encoder_hidden_states"]

    @unittest.skip("no embeddings to get or set: the model is given `query_embeds`")
    def test_model_get_set_embeddings(self):
        pass

    def test_config(self):
        ConfigTester(self, self.family.Blip2QFormerConfig, hidden_size=36).run_common_tests()


class DecoderOnlySuite(Suite):
    tiny, model = DecoderOnlyTester, "Blip2ForConditionalGeneration"
    _is_composite = True
    additional_model_inputs = ["pixel_values", "input_ids"]

    def setUp(self):
        super().setUp()
        # The mixin tells by the names in transformers' lists which models have a loss, and makes labels for those
        mapping = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
        names = {**getattr(modeling, mapping), "blip2": self.all_model_classes[0].__name__}
        patch = mock.patch.object(modeling, mapping, names)
        patch.start()
        self.addCleanup(patch.stop)

    def test_config(self):
        names = ["image_token_index", "num_query_tokens", "image_text_hidden_size"]
        tester = ConfigTester(self, self.family.Blip2Config, has_text_modality=False, common_properties=names)
        tester.run_common_tests()

    @unittest.skip("the source package lacks tests/generation, and with it GenerationTesterMixin")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("it asks for `image_outputs`, and excepts transformers' BLIP-2, whose `vision_outputs` ours are")
    def test_multimodal_outputs_are_returned(self):
        pass

    @unittest.skip("no base model beneath: the language model in it has a head of its own")
    def test_model_base_model_prefix(self):
        pass

    def _text_features_get_expected_num_attentions(self, model_tester=None):
        # The tester of the text is the model's own, in which transformers' method would look for it again
        return self.model_tester.num_hidden_layers


class EncoderDecoderSuite(DecoderOnlySuite):
    tiny = EncoderDecoderTester


class ImageTextSuite(Suite):
    """Models without a language model, whose text is the Q-Former's."""

    tiny = PreTrainingTester
    _is_composite = True

    def skip_text_config(self, *args, **kwargs):
        self.skipTest("reads the sizes of a text_config; here text is the Q-Former's")

    test_get_text_features_output_0 = skip_text_config
    test_get_text_features_output_2 = skip_text_config
    test_resize_embeddings_untied = skip_text_config
    test_resize_embeddings_untied_no_reinit_on_post_init = skip_text_config
    test_resize_tokens_embeddings = skip_text_config


class PreTrainingSuite(ImageTextSuite):
    model = "Blip2ForPreTraining"
    additional_model_inputs = ["pixel_values"]

    @unittest.skip("each pair is contrasted with the others of its batch")
    def test_batching_equivalence(self):
        pass

    @unittest.skip("the source package lacks tests/generation, and with it GenerationTesterMixin")
    def test_generation_tester_mixin_inheritance(self):
        pass

    @unittest.skip("it asks for `image_outputs`, and excepts transformers' BLIP-2, whose `vision_outputs` ours are")
    def test_multimodal_outputs_are_returned(self):
        pass

    @unittest.skip("no base model beneath: the Q-Former has no embeddings of its own")
    def test_model_base_model_prefix(self):
        pass

    def setUp(self):
        super().setUp()
        # Comparisons of outputs want no chance in them
        patch = mock.patch.object(torch, "multinomial", lambda weights, *args: weights.argmax(-1, keepdim=True))
        patch.start()
        self.addCleanup(patch.stop)


class RetrievalSuite(ImageTextSuite):
    model = "Blip2ForImageTextRetrieval"
    additional_model_inputs = ["input_ids"]

    def skip_parts(self, *args, **kwargs):
        self.skipTest("as transformers' own: what happens inside is in text_model_output and vision_model_output")

    test_attention_outputs = skip_parts
    test_hidden_states_output = skip_parts
    test_retain_grad_hidden_states_attentions = skip_parts

    def skip_loss(self, *args, **kwargs):
        self.skipTest("as transformers' own, it has no loss: Blip2ForPreTraining learns")

    test_training = skip_loss
    check_training_gradient_checkpointing = skip_loss


class ProcessorSuite(ProcessorTesterMixin):
    family = None
    _setup_tokenizer = staticmethod(tiny_tokenizer)
    _setup_image_processor = staticmethod(tiny_image_processor)

    @classmethod
    def setUpClass(cls):
        cls.processor_class = cls.family.Blip2Processor
        super().setUpClass()

    @classmethod
    def _setup_test_attributes(cls, processor):
        cls.image_token = str(processor.image_token)  # transformers' own keeps an AddedToken there
        if cls.family is not transformers:
            cls.video_token = "<video>"

    @staticmethod
    def prepare_processor_dict():
        return {"num_query_tokens": 1}
