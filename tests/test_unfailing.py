"""Output that nobody reads any more costs nothing but itself."""

from __future__ import annotations

import io
import os

from easgd_local.unfailing import Unfailing


def test_what_is_written_after_the_reader_has_left_is_dropped_and_that_is_told_once():
    told = []
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as pipe:
        out = Unfailing(pipe, lambda: told.append("lost"))
        print("heard", file=out, flush=True)
        assert os.read(reader, 99) == b"heard\n" and not told
        os.close(reader)
        for _ in range(3):
            print("unheard", file=out, flush=True)
    assert told == ["lost"]


def test_what_cannot_be_encoded_becomes_a_question_mark():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    print("η = 0.05 ± 0.01", file=Unfailing(stream), flush=True)
    assert stream.buffer.getvalue() == "? = 0.05 ± 0.01\n".encode("latin-1")


def test_a_stream_that_was_closed_or_has_no_descriptor_takes_nothing_and_breaks_nothing():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (closed, Full()):
        out = Unfailing(stream)
        for _ in range(2):
            print("unheard", file=out, flush=True)


def test_without_a_stream_there_is_nothing_to_write_to():
    print("unheard", file=Unfailing(None), flush=True)
