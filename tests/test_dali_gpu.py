"""pskd.data.dali on a GPU: its graph, which is built without one too, and the pixels it makes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.data.dali import DaliData
from pskd.data.graph import make_pipeline
from pskd.data.interface import validation_batches
from pskd.order import Plan, Walk
from tests.decoding import INTERPOLATIONS, PLAIN, SEED, WHOLE, batches, damage, validated
from tests.reading import changed


def nothing_to_read():
    raise StopIteration


def graph(options, **how):
    chosen = {"device_id": None, "largest": (500, 375), "whole": False} | how
    return make_pipeline(nothing_to_read, options, 4, **chosen)


def serialised(options, **how):
    """What can be had without a GPU: construct, check arguments, serialise."""
    return graph(options, **how).serialize()


MIXED = changed(PLAIN, mixed=True, augment="pskd-imagenet", hw_decoder_load=0.8125)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is built where there is a GPU")
@pytest.mark.parametrize("whole", [False, True])
def test_the_mixed_graph_asks_for_a_gpu_and_for_nothing_else(whole):
    with pytest.raises(RuntimeError, match="requires a CUDA-capable GPU"):
        graph(MIXED, whole=whole).build()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_the_mixed_graph_is_constructed_and_serialised(whole, channels_last, interpolation):
    options = changed(MIXED, channels_last=channels_last, interpolation=interpolation)
    mixed = serialised(options, whole=whole)
    for name in (
        b"hw_decoder_load",
        b"jpeg_fancy_upsampling",
        b"preallocate_width_hint",
        b"preallocate_height_hint",
        b"adjust_orientation",
        b"mixed",
    ):
        assert name in mixed
    assert np.float32(0.8125).tobytes() in mixed
    cpu = serialised(changed(options, mixed=False), whole=whole)
    assert b"hw_decoder_load" not in cpu
    assert b"mixed" not in cpu
    assert (b"decoders__ImageSlice" in mixed) == (b"decoders__ImageSlice" in cpu) == (not whole)


@pytest.mark.parametrize(
    "wrong", [{"hw_decoder_load": "much"}, {"threads": "all"}, {"interpolation": "nearest"}]
)
def test_wrong_arguments_of_the_mixed_graph_are_refused(wrong):
    with pytest.raises((TypeError, KeyError, RuntimeError, ValueError)) as caught:
        serialised(changed(MIXED, **wrong))
    assert "CUDA" not in str(caught.value)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def on_gpu(catalog, options, *, consume=None, epochs=2):
    """(epoch, id) -> image on the host, decoded on the GPU."""
    device = torch.device("cuda", 0)
    walk = Walk(Plan(len(catalog.train), 8), SEED, epochs, 0)
    data = DaliData(catalog, device, SEED, changed(options, mixed=True))
    data.begin(walk, 0, 0)
    kept = []
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        assert batch.images_BCHW.device == device
        assert batch.labels_B.device == device
        assert batch.weight_B.device == device
        assert batch.labels_B.tolist() == catalog.train.labels_N[micro.ids_B].tolist()
        if consume is not None:
            consume()
        kept.append((micro, batch.images_BCHW * 1))  # read on the stream, after what was queued
    data.close()
    return {
        (micro.epoch, sample): image.cpu()
        for micro, images in kept
        for sample, image in zip(micro.ids_B.tolist(), images, strict=True)
    }


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("load", [0.0, 0.65, 1.0])
def test_pixels_decoded_on_a_gpu_are_the_same_in_two_runs(photos, load):
    options = changed(PLAIN, image_size=224, validation_resize=256, hw_decoder_load=load)
    first, second = (on_gpu(photos, options) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["standard", "pskd-imagenet"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_decoded_on_a_gpu_are_near_those_of_the_cpu(photos, augment, channels_last):
    options = changed(
        PLAIN,
        image_size=224,
        validation_resize=256,
        augment=augment,
        channels_last=channels_last,
    )
    found = on_gpu(photos, options)
    for micro, batch in batches(photos, options, plan=Plan(40, 8)):
        for sample, wanted in zip(micro.ids_B.tolist(), batch.images_BCHW, strict=True):
            difference = (found[micro.epoch, sample] - wanted).abs() * 0.225 * 255
            assert difference.mean() < 1


@gpu
@pytest.mark.gpu
def test_a_late_reader_on_the_gpu_reads_its_own_batch(photos):
    options = changed(PLAIN, image_size=224, validation_resize=256, prefetch=1)
    prompt = on_gpu(photos, options)

    def delay():
        torch.cuda._sleep(100_000_000)  # cycles: some 50 ms on the stream, the host goes on

    late = on_gpu(photos, options, consume=delay)
    assert all(torch.equal(late[key], prompt[key]) for key in prompt)


@gpu
@pytest.mark.gpu
def test_a_bad_image_met_by_a_gpu_is_substituted(small):
    catalog, _ = small
    options = changed(WHOLE, on_bad_image="substitute", mixed=True)
    damage(Path(catalog.train.path(4)), "half")
    walk = Walk(Plan(24, 8), SEED, 2, 0)
    data = DaliData(catalog, torch.device("cuda", 0), SEED, options)
    data.begin(walk, 0, 0)
    met = []
    for micro in walk.start(0, 0):
        batch = data.train_batch(micro)
        met += [(micro.epoch, micro.ids_B.tolist()[row]) for row in batch.absent]
    assert met == [(0, 4), (1, 4)]


@gpu
@pytest.mark.gpu
def test_validation_on_a_gpu_counts_each_image_once_and_is_near_the_cpu(catalog):
    device = torch.device("cuda", 0)
    found, labels = [], []
    for rank in range(3):
        data = DaliData(catalog, device, SEED, changed(PLAIN, mixed=True))
        for images, some in validation_batches(data, rank, 3, 32):
            found.append(images.cpu())
            labels += some.tolist()
    assert labels == catalog.validation.labels_N.tolist()
    difference = (torch.cat(found) - validated(catalog)[0]).abs() * 0.225 * 255
    assert difference.mean() < 1
