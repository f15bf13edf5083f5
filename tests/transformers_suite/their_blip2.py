"""The suites on transformers' own BLIP-2. Not a test_*.py: some fail there; compare.py runs it by its name."""

import unittest

import transformers

from . import suites


class VisionTest(suites.VisionSuite, unittest.TestCase):
    family = transformers


class QFormerTest(suites.QFormerSuite, unittest.TestCase):
    family = transformers


class DecoderOnlyTest(suites.DecoderOnlySuite, unittest.TestCase):
    family = transformers


class EncoderDecoderTest(suites.EncoderDecoderSuite, unittest.TestCase):
    family = transformers


class ProcessorTest(suites.ProcessorSuite, unittest.TestCase):
    family = transformers
