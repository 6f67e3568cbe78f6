"""The generated code is that of proto/, and the service can be explored without it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from google.protobuf.descriptor_pool import DescriptorPool

from cluster.pb.generate import ROOT, generate
from cluster.pb.outrider.v1 import generation_pb2 as pb

pytestmark = pytest.mark.timeout(60)


def test_generated_code_has_not_drifted() -> None:
    files = generate()
    assert len(files) == 5
    for path, text in files.items():
        assert (ROOT / path).read_text() == text, f"{path} is not what proto/ gives: run python -m cluster.pb.generate"


def test_drift_would_be_noticed(tmp_path) -> None:
    proto = tmp_path / "proto/outrider/v1/generation.proto"
    proto.parent.mkdir(parents=True)
    source = (ROOT / "proto/outrider/v1/generation.proto").read_text()
    proto.write_text(source.replace("int32 num_accepted = 4", "int32 num_accepted = 99"))
    assert generate(tmp_path) != generate()


def test_every_message_field_and_method_is_documented() -> None:
    lines = (ROOT / "proto/outrider/v1/generation.proto").read_text().splitlines()
    starts = ("message ", "enum ", "service ", "rpc ", "oneof ", "FINISH_")
    for number, line in enumerate(lines):
        text = line.strip()
        if text.startswith(starts) or text.endswith(";") and " = " in text and "syntax" not in text:
            assert lines[number - 1].strip().startswith("//"), line


def test_parameters_on_the_wire_are_those_of_the_config() -> None:
    from runtime.config import LookaheadConfig, SamplingParams

    assert set(pb.LookaheadParams.DESCRIPTOR.fields_by_name) == set(LookaheadConfig.model_fields)
    assert set(pb.SamplingParams.DESCRIPTOR.fields_by_name) == set(SamplingParams.model_fields)


def test_messages_need_no_grpc_and_the_client_no_torch() -> None:
    check = (
        "import sys; import cluster.pb.outrider.v1.generation_pb2; assert 'grpc' not in sys.modules;"
        "import cluster.client.client; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=50)


def test_descriptors_stand_alone() -> None:
    """As another language's generator or a reflection client sees them."""
    file = DescriptorPool().AddSerializedFile(pb.DESCRIPTOR.serialized_pb)
    assert file.name == "outrider/v1/generation.proto"
    assert file.services_by_name["GenerationService"].methods_by_name["Generate"].server_streaming
