"""Lists are fetched from a server that does everything wrong."""

import csv
import email.utils
import hashlib
import threading
import time

import pytest

from dinogen.prepare.download.download import download
from dinogen.prepare.download.links import Failure
from tests.prepare.wrong_server import BODY, JPEG, SHA256, names, serve, status


def failed(folder):
    with (folder / "failed.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_list_is_fetched(server, fetch):
    calls = []
    summary = fetch(
        "# photos",
        server.url("plain.jpg", serve()),
        "",
        f"{server.url('dir/checked.jpg', serve())}  {SHA256}",
        f"{server.url('x', serve(b'other'))} {hashlib.sha256(b'other').hexdigest()} my own.jpg",
        f"{server.url('y', serve(JPEG))}\tnamed.png",
        progress=lambda *numbers: calls.append(numbers),
    )
    assert names(fetch.out) == ["checked.jpg", "my own.jpg", "named.png", "plain.jpg"]
    assert (fetch.out / "plain.jpg").read_bytes() == BODY
    assert (fetch.out / "my own.jpg").read_bytes() == b"other"
    assert (fetch.out / "named.png").read_bytes() == JPEG
    assert (summary.num_files, summary.num_fetched, summary.num_present) == (4, 4, 0)
    assert summary.failures == ()
    assert calls[-1] == (4, 4, 2 * len(BODY) + len(JPEG) + 5)
    assert [call[0] for call in calls] == [1, 2, 3, 4]


def test_csv_with_and_without_header(server, fetch):
    url = server.url("a.jpg", serve())
    fetch("filename,url", f'"b, c.jpg",{url}', suffix="csv")
    assert names(fetch.out) == ["b, c.jpg"]
    fetch(f"{url},{SHA256},d.jpg", suffix="csv")
    assert names(fetch.out) == ["b, c.jpg", "d.jpg"]


def test_what_is_there_is_not_fetched_again(server, fetch):
    lines = [
        server.url("a.jpg", serve()),
        f"{server.url('b.jpg', serve())} {SHA256}",
        f"{server.url('c.jpg', serve())} {SHA256}",
    ]
    fetch(*lines)
    (fetch.out / "c.jpg").write_bytes(BODY[:-1] + b"!")
    server.requests.clear()
    summary = fetch(*lines)
    assert [path for path, _ in server.requests] == ["/c.jpg"]
    assert (summary.num_fetched, summary.num_present) == (1, 2)
    assert (fetch.out / "c.jpg").read_bytes() == BODY


def test_a_dropped_connection_is_resumed(server, fetch):
    url = server.url("a.jpg", serve(stop_after=100_000), serve(stop_after=50_000), serve())
    summary = fetch(url)
    assert server.ranges("a.jpg") == [None, "bytes=100000-", "bytes=150000-"]
    assert (fetch.out / "a.jpg").read_bytes() == BODY
    assert summary.num_bytes == len(BODY)
    assert names(fetch.out) == ["a.jpg"]


def test_a_server_that_always_breaks_off_still_gets_the_file_across(server, fetch):
    summary = fetch(server.url("a.jpg", serve(stop_after=30_000)), num_attempts=1)
    assert summary.failures == ()
    assert (fetch.out / "a.jpg").read_bytes() == BODY
    assert len(server.ranges("a.jpg")) == 10


def test_the_next_run_goes_on_where_the_last_one_ended(server, fetch):
    url = server.url("a.jpg", serve(stop_after=120_000), status(503))
    summary = fetch(url, num_attempts=1)
    assert [failure.reason for failure in summary.failures] == ["http_503"]
    assert names(fetch.out) == [".a.jpg.part", ".a.jpg.part.json", "failed.csv"]
    server.requests.clear()
    server.url("a.jpg", serve())
    assert fetch(url).num_bytes == len(BODY) - 120_000
    assert server.ranges("a.jpg") == ["bytes=120000-"]
    assert (fetch.out / "a.jpg").read_bytes() == BODY
    assert names(fetch.out) == ["a.jpg"]


def test_killed_between_the_last_byte_and_the_name(server, fetch):
    url = server.url("a.jpg", serve(stop_after=120_000), status(503))
    fetch(url, num_attempts=1)
    (fetch.out / ".a.jpg.part").write_bytes(BODY)
    server.url("a.jpg", serve())
    assert fetch(url).num_bytes == 0
    assert (fetch.out / "a.jpg").read_bytes() == BODY


def test_a_file_that_changed_on_the_server_is_not_patched_together(server, fetch):
    newer = JPEG + BODY[: len(JPEG) - 1 : -1]
    url = server.url("a.jpg", serve(stop_after=100_000), serve(newer, etag='"two"'))
    fetch(url)
    assert (fetch.out / "a.jpg").read_bytes() == newer


@pytest.mark.parametrize("options", [{"etag": None}, {"etag": 'W/"weak"'}])
def test_without_proof_that_it_is_the_same_a_file_begins_again(server, fetch, options):
    fetch(server.url("a.jpg", serve(stop_after=100_000, **options), serve(**options)))
    assert server.ranges("a.jpg") == [None, None]
    assert (fetch.out / "a.jpg").read_bytes() == BODY


def test_a_date_or_a_checksum_is_proof_too(server, fetch):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    fetch(
        server.url(
            "a.jpg",
            serve(stop_after=9000, etag=None, Last_Modified=date),
            serve(etag=None, Last_Modified=date),
        ),
        f"{server.url('b.jpg', serve(stop_after=9000, etag=None), serve(etag=None))} {SHA256}",
    )
    assert server.ranges("a.jpg") == server.ranges("b.jpg") == [None, "bytes=9000-"]
    assert (fetch.out / "a.jpg").read_bytes() == (fetch.out / "b.jpg").read_bytes() == BODY


def test_a_server_without_ranges(server, fetch):
    fetch(server.url("a.jpg", serve(stop_after=100_000), serve(ranges=False)))
    assert server.ranges("a.jpg") == [None, "bytes=100000-"]
    assert (fetch.out / "a.jpg").read_bytes() == BODY


def test_a_server_without_ranges_that_always_breaks_off_is_given_up(server, fetch):
    url = server.url("a.jpg", serve(stop_after=100_000, ranges=False))
    summary = fetch(url, num_attempts=3)
    assert [failure.reason for failure in summary.failures] == ["connection"]
    assert len(server.ranges("a.jpg")) == 4
    assert "a.jpg" not in names(fetch.out)


def test_server_errors_are_retried_with_growing_waits(server, fetch):
    fetch(server.url("a.jpg", status(500), status(502), status(429), serve()), num_attempts=4)
    assert (fetch.out / "a.jpg").read_bytes() == BODY
    assert len(fetch.waits) == 3
    for wait, longest in zip(fetch.waits, (1, 2, 4), strict=True):
        assert longest / 2 <= wait <= longest


def test_retry_after_is_honoured(server, fetch):
    soon = email.utils.formatdate(time.time() + 100, usegmt=True)
    url = server.url("a.jpg", status(429, Retry_After="7"), status(503, Retry_After=soon), serve())
    fetch(url)
    assert fetch.waits[0] == 7
    assert 90 < fetch.waits[1] <= 100
    summary = fetch(server.url("b.jpg", status(503, Retry_After="86400")))
    assert summary.failures[0].reason == "retry_after"
    assert "86400" in summary.failures[0].detail


def test_failures_are_listed_and_gone_once_fixed(server, fetch):
    lines = [
        server.url("gone.jpg", status(404)),
        server.url("down.jpg", status(500)),
        server.url("good.jpg", serve()),
        f"{server.url('wrong.jpg', serve())} {'0' * 64}",
        server.url("brotli.jpg", serve(Content_Encoding="br")),
        server.url("loop.jpg", lambda h: status(302, Location=h.path)(h)),
    ]
    summary = fetch(*lines)
    rows = failed(fetch.out)
    assert [(row["filename"], row["reason"]) for row in rows] == [
        ("gone.jpg", "http_404"),
        ("down.jpg", "http_500"),
        ("wrong.jpg", "checksum"),
        ("brotli.jpg", "protocol"),
        ("loop.jpg", "protocol"),
    ]
    assert (rows[0]["line"], rows[0]["url"]) == ("1", lines[0])
    assert SHA256 in rows[2]["detail"]
    assert isinstance(summary.failures[0], Failure)
    assert len(server.ranges("gone.jpg")) == 1
    assert len(server.ranges("down.jpg")) == 3
    assert names(fetch.out) == ["failed.csv", "good.jpg"]
    for name in ("gone.jpg", "down.jpg"):
        server.url(name, serve())
    assert fetch(*lines[:3]).failures == ()
    assert names(fetch.out) == ["down.jpg", "gone.jpg", "good.jpg"]


def test_nobody_listens(server, fetch):
    url = server.url("a.jpg", serve())
    server.shutdown()
    server.server_close()
    summary = fetch(url, num_attempts=2)
    assert [failure.reason for failure in summary.failures] == ["connection"]


def test_several_at_a_time(server, fetch):
    four = threading.Barrier(4)  # each answer waits until four are asked for
    lines = [server.url(f"{n}.jpg", serve(before=lambda: four.wait(60))) for n in range(8)]
    fetch(*lines, num_parallel=4)
    assert server.most_together == 4


def test_redirects_are_followed(server, fetch):
    target = server.url("target", serve())
    fetch(server.url("a.jpg", status(302, Location=target)))
    assert (fetch.out / "a.jpg").read_bytes() == BODY


def test_an_interruption_ends_at_once_and_keeps_the_parts(server, fetch):
    lines = [server.url("a.jpg", serve()), server.url("b.jpg", serve(stop_after=1000), status(503))]
    part = fetch.out / ".b.jpg.part"

    def interrupt(*numbers):
        while not part.exists() or part.stat().st_size < 1000:
            time.sleep(0.01)
        raise KeyboardInterrupt

    begin = time.monotonic()
    listing = fetch.out.parent / "list.txt"
    listing.write_text("\n".join(lines))
    with pytest.raises(KeyboardInterrupt):
        download(listing, fetch.out, num_attempts=1000, progress=interrupt)
    assert time.monotonic() - begin < 60  # a thousand attempts take hours
    assert part.read_bytes() == BODY[:1000]
