import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blkferry.drivers.qcow2 import header as qcow2
from blkferry.drivers.qcow2.extensions import (
    BitmapsExtension,
    EncryptionPointer,
    ExtensionType,
    FeatureName,
    default_feature_names,
    join,
)
from blkferry.drivers.qcow2.header import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Header,
    Incompatible,
)
from blkferry.errors import Error, ErrorKind

CLUSTER = 65536

# What QEMU 10.0's qemu-img wrote, without the zeroes at the end of the cluster. The table of feature names, where there
# is one, is the same in all of them.
NAMES = bytes.fromhex("6803f85700000180") + b"".join(
    name.ljust(48, b"\0")
    for name in (
        b"\0\0dirty bit",
        b"\0\1corrupt bit",
        b"\0\2external data file",
        b"\0\3compression type",
        b"\0\4extended L2 entries",
        b"\1\0lazy refcounts",
        b"\2\0bitmaps",
        b"\2\1raw external data",
    )
)

# qemu-img create -f qcow2 v3.qcow2 64M
PLAIN = (
    bytes.fromhex(
        "514649fb0000000300000000000000000000000000000010000000000400000000000000000000010000000000030000"
        "000000000001000000000001000000000000000000000000000000000000000000000000000000000000000000000000"
        "00000004000000700000000000000000"
    )
    + NAMES
)
# qemu-img create -u -f qcow2 -o compat=0.10 -b base.raw -F raw v2.qcow2 64M
VERSION_2 = (
    bytes.fromhex(
        "514649fb0000000200000000000000600000000800000010000000000400000000000000000000010000000000030000"
        "000000000001000000000001000000000000000000000000e2792aca0000000372617700000000000000000000000000"
    )
    + b"base.raw"
)
# qemu-img create -u -f qcow2 -o cluster_size=512,refcount_bits=1 -b base.raw -F raw small.qcow2 1M
SMALL = (
    bytes.fromhex(
        "514649fb0000000300000000000000880000000800000009000000000010000000000000000000200000000000000600"
        "000000000000020000000001000000000000000000000000000000000000000000000000000000000000000000000000"
        "00000000000000700000000000000000e2792aca0000000372617700000000000000000000000000"
    )
    + b"base.raw"
)
# qemu-img create -f qcow2 -o extended_l2=on,compression_type=zstd,lazy_refcounts=on,data_file=x.raw,data_file_raw=on
#     data-file.qcow2 64M
DATA_FILE = (
    bytes.fromhex(
        "514649fb0000000300000000000000000000000000000010000000000400000000000000000000010000000000030000"
        "000000000001000000000001000000000000000000000000000000000000001c00000000000000010000000000000002"
        "000000040000007001000000000000004441544100000005782e726177000000"
    )
    + NAMES
)
# qemu-img create -f qcow2 -o cluster_size=8k bitmaps.qcow2 64M; qemu-img bitmap --add bitmaps.qcow2 first;
# qemu-img bitmap --add --disable -g 4096 bitmaps.qcow2 second
BITMAPS = (
    bytes.fromhex(
        "514649fb000000030000000000000000000000000000000d000000000400000000000000000000080000000000006000"
        "000000000000200000000001000000000000000000000000000000000000000000000000000000000000000000000001"
        "00000004000000700000000000000000"
    )
    + NAMES
    + bytes.fromhex("238528750000001800000002000000000000000000000040000000000001")
)
# qemu-img create --object secret,id=s,data=x -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s luks.qcow2 1M
LUKS = (
    bytes.fromhex(
        "514649fb0000000300000000000000000000000000000010000000000010000000000002000000010000000000030000"
        "000000000001000000000001000000000000000000000000000000000000000000000000000000000000000000000000"
        "000000040000007000000000000000000537be7700000010000000000004000000000000001f9000"
    )
    + NAMES
)


def new(**fields) -> Header:
    """A header that is right, but for what is given."""
    return Header(
        **{
            "size": 64 << 20,
            "l1_size": 1,
            "l1_table_offset": 3 * CLUSTER,
            "refcount_table_offset": CLUSTER,
            "refcount_table_clusters": 1,
        }
        | fields
    )


def patched(at: int, layout: str, *values: int, image: bytes = PLAIN) -> bytes:
    data = bytearray(image)
    struct.pack_into(layout, data, at, *values)
    return bytes(data)


def extended(*extensions: bytes, image: bytes = PLAIN) -> bytes:
    """An image with these extensions and no others."""
    return image[:112] + b"".join(extensions)


def refusal(data: bytes, **options) -> Error:
    with pytest.raises(Error) as caught:
        Header.parse(data, **options)
    error = caught.value
    assert error.kind in {ErrorKind.CORRUPT, ErrorKind.UNSUPPORTED}
    assert error.facts["structure"]
    assert isinstance(error.facts["offset"], int)
    return error


GOLDEN = {
    "plain": (PLAIN, new(feature_names=default_feature_names(3, 16))),
    "version 2": (VERSION_2, new(version=2, backing_file="base.raw", backing_format="raw")),
    "small": (
        SMALL,
        new(
            cluster_bits=9,
            size=1 << 20,
            l1_size=32,
            l1_table_offset=1536,
            refcount_table_offset=512,
            refcount_order=0,
            backing_file="base.raw",
            backing_format="raw",
        ),
    ),
    "data file": (
        DATA_FILE,
        new(
            incompatible=Incompatible.DATA_FILE | Incompatible.COMPRESSION | Incompatible.EXTENDED_L2,
            compatible=Compatible.LAZY_REFCOUNTS,
            autoclear=Autoclear.DATA_FILE_RAW,
            compression_type=CompressionType.ZSTD,
            data_file="x.raw",
            feature_names=default_feature_names(3, 16),
        ),
    ),
    "bitmaps": (
        BITMAPS,
        new(
            cluster_bits=13,
            l1_size=8,
            l1_table_offset=24576,
            refcount_table_offset=8192,
            autoclear=Autoclear.BITMAPS,
            bitmaps=BitmapsExtension(count=2, directory_size=64, directory_offset=CLUSTER),
            feature_names=default_feature_names(3, 13),
        ),
    ),
    "luks": (
        LUKS,
        new(
            size=1 << 20,
            crypt_method=CryptMethod.LUKS,
            encryption=EncryptionPointer(4 * CLUSTER, 2068480),
            feature_names=default_feature_names(3, 16),
        ),
    ),
}


@pytest.mark.parametrize(("image", "header"), GOLDEN.values(), ids=GOLDEN)
class TestGolden:
    def test_parse(self, image, header):
        assert Header.parse(image) == header

    def test_build(self, image, header):
        assert header.build().rstrip(b"\0") == image.rstrip(b"\0")

    def test_whole_cluster_and_more(self, image, header):
        assert Header.parse(image.ljust(header.cluster_size, b"\0") + b"next cluster") == header


class TestDerived:
    def test_plain(self):
        header = new()
        assert (header.cluster_size, header.refcount_bits, header.header_length) == (CLUSTER, 16, 112)
        assert (header.l2_entry_size, header.l2_entries) == (8, 8192)
        assert (header.extended_l2, header.subclusters, header.subcluster_size) == (False, 1, CLUSTER)

    def test_extended_l2(self):
        header = new(incompatible=Incompatible.EXTENDED_L2)
        assert (header.l2_entry_size, header.l2_entries) == (16, 4096)
        assert (header.extended_l2, header.subclusters, header.subcluster_size) == (True, 32, 2048)

    @pytest.mark.parametrize(
        ("size", "needed"), [(0, 0), (1, 1), (512 << 20, 1), ((512 << 20) + 1, 2), (1 << 40, 2048)]
    )
    def test_l1_entries_needed(self, size, needed):
        assert new(size=size).l1_entries_needed == needed

    def test_header_length(self):
        assert new(version=2).header_length == 72
        assert new(unknown_fields=bytes(6) + b"x").header_length == 112
        assert new(unknown_fields=bytes(7) + b"x").header_length == 120

    def test_default_feature_names(self):
        assert len(default_feature_names(3, 13)) == 8
        assert default_feature_names(3, 12) == default_feature_names(2, 16) == ()


class TestInPlace:
    """Fields that are packed alone are where `parse` reads them."""

    @pytest.mark.parametrize(
        ("at", "packed", "change"),
        [
            (qcow2.SIZE_AT, qcow2.pack_size(4096), {"size": 4096}),
            (
                qcow2.L1_TABLE_AT,
                qcow2.pack_l1_table(7, 9 * CLUSTER),
                {"l1_size": 7, "l1_table_offset": 9 * CLUSTER},
            ),
            (
                qcow2.REFCOUNT_TABLE_AT,
                qcow2.pack_refcount_table(8 * CLUSTER, 2),
                {"refcount_table_offset": 8 * CLUSTER, "refcount_table_clusters": 2},
            ),
            (
                qcow2.SNAPSHOTS_AT,
                qcow2.pack_snapshots(3, 5 * CLUSTER),
                {"nb_snapshots": 3, "snapshots_offset": 5 * CLUSTER},
            ),
            (
                qcow2.INCOMPATIBLE_AT,
                qcow2.pack_features(Incompatible.DIRTY | Incompatible.CORRUPT),
                {"incompatible": Incompatible.DIRTY | Incompatible.CORRUPT},
            ),
            (
                qcow2.COMPATIBLE_AT,
                qcow2.pack_features(Compatible.LAZY_REFCOUNTS),
                {"compatible": Compatible.LAZY_REFCOUNTS},
            ),
            (qcow2.AUTOCLEAR_AT, qcow2.pack_features(Autoclear(8)), {"autoclear": Autoclear(8)}),
        ],
    )
    def test_field(self, at, packed, change):
        image = PLAIN[:at] + packed + PLAIN[at + len(packed) :]
        assert Header.parse(image) == dataclasses.replace(Header.parse(PLAIN), **change)


class TestClusterBits:
    def test_needs_24_bytes(self):
        assert Header.cluster_bits_of(PLAIN[:24]) == 16
        assert Header.cluster_bits_of(SMALL) == 9

    @pytest.mark.parametrize("head", [b"", b"QFI\xfb", PLAIN[:23], b"QFI\xfa" + PLAIN[4:], bytes(104)])
    def test_other_formats(self, head):
        with pytest.raises(Error, match="Image is not in qcow2 format"):
            Header.cluster_bits_of(head)

    @pytest.mark.parametrize("version", [0, 1, 4, 0xFFFFFFFF])
    def test_version(self, version):
        with pytest.raises(Error, match=f"Unsupported qcow2 version {version}$"):
            Header.cluster_bits_of(patched(4, ">I", version))

    @pytest.mark.parametrize("bits", [0, 8, 22, 0xFFFFFFFF])
    def test_cluster_size(self, bits):
        with pytest.raises(Error, match=rf"Unsupported cluster size: 2\^{bits}$"):
            Header.cluster_bits_of(patched(20, ">I", bits))


FIELDS = {
    "length too short": (patched(100, ">I", 96), "qcow2 header too short"),
    "length beyond cluster": (patched(100, ">I", CLUSTER + 8), "qcow2 header exceeds cluster size"),
    "length odd": (patched(100, ">I", 108), "qcow2 header length 108 is not a multiple of 8"),
    "backing behind cluster": (patched(8, ">QI", CLUSTER + 1, 1), "Invalid backing file offset"),
    "backing in header": (patched(8, ">QI", 64, 1), "Invalid backing file offset"),
    "backing offset huge": (patched(8, ">QI", (1 << 64) - 1, 1), "Invalid backing file offset"),
    "backing name too long": (patched(8, ">QI", 2048, 1024), "Backing file name too long"),
    "backing name leaves cluster": (patched(8, ">QI", CLUSTER - 4, 5), "Backing file name too long"),
    "crypt method": (patched(32, ">I", 3), "Unsupported encryption method 3"),
    "luks without pointer": (patched(32, ">I", 2), "Missing CRYPTO header for crypt method 2"),
    "aes with pointer": (
        patched(32, ">I", 1, image=LUKS),
        "CRYPTO header extension only expected with LUKS encryption method",
    ),
    "refcount order": (
        patched(96, ">I", 7),
        "Reference count entry width too large; may not exceed 64 bits",
    ),
    "no refcount table": (patched(56, ">I", 0), "Image does not contain a reference count table"),
    "refcount table too large": (patched(56, ">I", 129), "Reference count table too large"),
    "refcount table unaligned": (patched(48, ">Q", CLUSTER + 512), "Reference count table offset invalid"),
    "refcount table at 0": (patched(48, ">Q", 0), "Reference count table offset invalid"),
    "refcount table huge": (patched(48, ">Q", (1 << 63) - CLUSTER), "Reference count table offset invalid"),
    "l1 too large": (patched(36, ">I", (4 << 20) + 1), "Active L1 table too large"),
    "l1 unaligned": (patched(40, ">Q", 1), "Active L1 table offset invalid"),
    "l1 at 0": (patched(40, ">Q", 0), "Active L1 table offset invalid"),
    "l1 negative": (patched(40, ">Q", 1 << 63), "Active L1 table offset invalid"),
    "l1 too small": (patched(24, ">Q", (512 << 20) + 1), "L1 table is too small"),
    "size": (patched(24, ">Q", (1 << 64) - 1), "Image is too big"),
    "snapshots too many": (patched(60, ">IQ", 65537, CLUSTER), "Snapshot table too large"),
    "snapshots unaligned": (patched(64, ">Q", 8), "Snapshot table offset invalid"),
    "snapshots at 0": (patched(60, ">IQ", 1, 0), "Snapshot table offset invalid"),
    "snapshots huge": (patched(60, ">IQ", 1, 1 << 63), "Snapshot table offset invalid"),
    "compression type": (
        patched(104, ">B", 2, image=patched(72, ">Q", 8)),
        "qcow2: unknown compression type: 2",
    ),
    "compression bit missing": (
        patched(104, ">B", 1),
        "qcow2: Compression type incompatible feature bit must be set",
    ),
    "compression bit alone": (
        patched(72, ">Q", 8),
        "qcow2: Compression type incompatible feature bit must not be set",
    ),
    "subclusters": (patched(72, ">Q", 16, image=SMALL), "Unsupported subcluster size: 16"),
    "raw without data file": (patched(88, ">Q", 2), "data-file-raw requires a data file"),
    "raw with backing file": (
        patched(8, ">QI", 2048, 4, image=DATA_FILE).ljust(2048, b"\0") + b"base",
        "Backing file and data-file-raw cannot be used at the same time",
    ),
    "bitmaps bit alone": (
        patched(88, ">Q", 1),
        "Bitmaps extension is missing, although the autoclear feature bit says that it is consistent",
    ),
}


@pytest.mark.parametrize(("image", "sentence"), FIELDS.values(), ids=FIELDS)
def test_field_refused(image, sentence):
    assert str(refusal(image)) == sentence


class TestFeatures:
    def test_unknown_has_the_name_the_image_gives_it(self):
        name = join(ExtensionType.FEATURE_NAMES, FeatureName(0, 63, "time travel").build())
        image = extended(name, image=patched(72, ">Q", 1 << 63))
        assert str(refusal(image)) == "Unsupported qcow2 feature(s): time travel"

    def test_unknown_with_and_without_names(self):
        names = b"".join(
            FeatureName(*entry).build() for entry in [(1, 5, "not this"), (0, 5, "one\x1b[2J"), (0, 6, "two")]
        )
        broken = join(ExtensionType.FEATURE_NAMES, names) + struct.pack(">II", 1, 0xFFFFFFFF)
        image = extended(broken, image=patched(72, ">Q", 0xE1))
        expected = "Unsupported qcow2 feature(s): one?[2J, two, Unknown incompatible feature: 80"
        assert str(refusal(image)) == expected
        assert refusal(image).kind == ErrorKind.UNSUPPORTED

    def test_unknown_without_a_table(self):
        broken = struct.pack(">II", 1, 0xFFFFFFFF)
        image = extended(broken, image=patched(72, ">Q", 1 << 20))
        assert str(refusal(image)) == "Unsupported qcow2 feature(s): Unknown incompatible feature: 100000"

    def test_unknown_compatible_and_autoclear_bits_are_kept(self):
        header = Header.parse(patched(80, ">QQ", 1 << 63 | 1, 1 << 62))
        assert header.compatible == Compatible.LAZY_REFCOUNTS | Compatible(1 << 63)
        assert header.autoclear == Autoclear(1 << 62)
        assert Header.parse(header.build()) == header

    def test_version_2_has_none(self):
        assert Header.parse(patched(72, ">I", 0, image=VERSION_2)).incompatible == 0


def bitmaps(count=1, reserved=0, size=32, offset=CLUSTER) -> bytes:
    return join(ExtensionType.BITMAPS, struct.pack(">IIQQ", count, reserved, size, offset))


EXTENSIONS = {
    "cut off": (struct.pack(">II", 0x12345678, CLUSTER), 0, "Header extension too large"),
    "twice": (bitmaps() * 2, 0, "Header extension BITMAPS at 0x98 is there twice"),
    "backing format": (
        join(ExtensionType.BACKING_FORMAT, b"0123456789abcdef"),
        0,
        "ERROR: ext_backing_format: len=16 too large (>=16)",
    ),
    "pointer size": (
        join(ExtensionType.ENCRYPTION, bytes(15)),
        0,
        "CRYPTO header extension size 15, but expected size 16",
    ),
    "bitmaps size": (join(ExtensionType.BITMAPS, bytes(23)), 0, "bitmaps_ext: Invalid extension length"),
    "bitmaps reserved": (bitmaps(reserved=1), 1, "bitmaps_ext: Reserved field is not zero"),
    "no bitmaps": (bitmaps(count=0), 1, "found bitmaps extension with zero bitmaps"),
    "too many bitmaps": (
        bitmaps(count=65536),
        1,
        "bitmaps_ext: Image has 65536 bitmaps, exceeding the QEMU supported maximum of 65535",
    ),
    "bitmaps unaligned": (bitmaps(offset=CLUSTER + 8), 1, "bitmaps_ext: invalid bitmap directory offset"),
    "bitmaps nowhere": (bitmaps(offset=0), 1, "bitmaps_ext: invalid bitmap directory offset"),
    "bitmaps negative": (bitmaps(offset=1 << 63), 1, "bitmaps_ext: invalid bitmap directory offset"),
    "bitmap directory empty": (bitmaps(size=0), 1, "Requested bitmap directory size is zero"),
    "bitmap directory too large": (
        bitmaps(size=65535 * 1024 + 1),
        1,
        "bitmaps_ext: bitmap directory size (67107841) exceeds the maximum supported size (67107840)",
    ),
}


@pytest.mark.parametrize(("extensions", "autoclear", "sentence"), EXTENSIONS.values(), ids=EXTENSIONS)
def test_extension_refused(extensions, autoclear, sentence):
    image = extended(extensions, image=patched(88, ">Q", autoclear))
    assert str(refusal(image)) == sentence


class TestExtensions:
    @pytest.mark.parametrize(
        ("offset", "length", "sentence"),
        [
            (CLUSTER + 1, 1, "Encryption header offset '65537' is not a multiple of cluster size '65536'"),
            (0, 1, "Encryption header of 1 bytes at 0x0 cannot be there"),
            (CLUSTER, 1 << 63, "Encryption header of 9223372036854775808 bytes at 0x10000 cannot be there"),
        ],
    )
    def test_encryption_pointer(self, offset, length, sentence):
        assert str(refusal(patched(120, ">QQ", offset, length, image=LUKS))) == sentence

    def test_unknown_are_kept_in_order(self):
        unknown = ((0x12345678, b"abc"), (0x77777777, b""), (0x12345678, b"again"))
        header = Header.parse(extended(*(join(*extension) for extension in unknown)))
        assert header.unknown_extensions == unknown
        assert Header.parse(header.build()) == header

    def test_end_marker_ends_them(self):
        assert Header.parse(extended(join(0, b""), bitmaps(reserved=1))).bitmaps is None

    def test_none_needed_before_the_backing_file(self):
        image = patched(8, ">QI", 112, 4)[:112] + b"base"
        assert Header.parse(image).backing_file == "base"

    def test_cut_off_by_the_backing_file(self):
        image = patched(8, ">QI", 116, 4)[:112] + b"\0\0\0\1base"
        assert str(refusal(image)) == "Header extension too large"

    def test_stale_bitmaps_are_kept_unchecked(self):
        header = Header.parse(extended(bitmaps(count=0, size=1, offset=3)))
        assert header.bitmaps == BitmapsExtension(0, 1, 3)
        assert Autoclear.BITMAPS not in header.autoclear
        assert Header.parse(header.build()) == header

    def test_strings_end_at_a_zero_byte(self):
        header = Header.parse(extended(join(ExtensionType.DATA_FILE, b"a\0b"), join(ExtensionType.BACKING_FORMAT, b"")))
        assert (header.data_file, header.backing_format) == ("a", None)

    def test_names_of_any_bytes(self):
        image = patched(8, ">QI", 112, 3)[:112] + b"\xff/\x80"
        header = Header.parse(image)
        assert header.backing_file == "\udcff/\udc80"
        assert header.build().endswith(b"\xff/\x80")


class TestLength:
    def test_104_bytes(self):
        image = patched(100, ">I", 104)[:104] + PLAIN[112:]
        assert Header.parse(image) == Header.parse(PLAIN)

    def test_unknown_fields_are_kept(self):
        image = patched(100, ">I", 128)[:112] + b"new field\0\0\0\0\0\0\0" + NAMES
        header = Header.parse(image)
        assert header.unknown_fields == bytes(7) + b"new field"
        assert header.build().rstrip(b"\0") == image.rstrip(b"\0")

    def test_fields_in_the_padding_are_kept(self):
        header = Header.parse(patched(105, ">B", 7))
        assert header.unknown_fields == b"\7"
        assert header.build()[104:112] == b"\0\7\0\0\0\0\0\0"


class TestFileSize:
    def test_tables_begin_inside(self):
        assert Header.parse(PLAIN, file_size=3 * CLUSTER + 8) == Header.parse(PLAIN)

    def test_l1_table_behind_the_end(self):
        error = refusal(PLAIN, file_size=3 * CLUSTER)
        assert str(error) == "Active L1 table at 0x30000 begins behind the end of the image file (196608 bytes)"

    def test_refcount_table_behind_the_end(self):
        error = refusal(patched(48, ">Q", 8 * CLUSTER), file_size=8 * CLUSTER)
        assert str(error).startswith("Reference count table at 0x80000 begins behind the end")

    def test_no_l1_table_for_an_empty_disk(self):
        image = patched(24, ">QIIQ", 0, 0, 0, 0)
        assert Header.parse(image, file_size=2 * CLUSTER).l1_size == 0


class TestBuildRefuses:
    @pytest.mark.parametrize(
        ("fields", "kind"),
        [
            ({"cluster_bits": 9, "l1_size": 2048, "backing_file": "x" * 400}, ErrorKind.NO_SPACE),
            ({"data_file": "x" * CLUSTER}, ErrorKind.NO_SPACE),
            ({"backing_file": ""}, ErrorKind.INVALID_ARGUMENT),
            ({"backing_file": "a\0b"}, ErrorKind.INVALID_ARGUMENT),
            ({"backing_file": "\ud800"}, ErrorKind.INVALID_ARGUMENT),
            ({"backing_file": "x" * 1024}, ErrorKind.INVALID_ARGUMENT),
            ({"backing_format": "x" * 16}, ErrorKind.INVALID_ARGUMENT),
            ({"feature_names": (FeatureName(0, 1, "x" * 47),)}, ErrorKind.INVALID_ARGUMENT),
            ({"feature_names": (FeatureName(0, 256, "x"),)}, ErrorKind.INVALID_ARGUMENT),
            ({"unknown_fields": b"x\0"}, ErrorKind.INVALID_ARGUMENT),
            ({"unknown_extensions": ((0, b""),)}, ErrorKind.INVALID_ARGUMENT),
            ({"unknown_extensions": ((int(ExtensionType.BITMAPS), b""),)}, ErrorKind.INVALID_ARGUMENT),
            ({"version": 2, "compatible": Compatible.LAZY_REFCOUNTS}, ErrorKind.INVALID_ARGUMENT),
            ({"version": 2, "refcount_order": 5}, ErrorKind.INVALID_ARGUMENT),
            ({"l1_size": 0}, ErrorKind.CORRUPT),
            ({"incompatible": Incompatible(32)}, ErrorKind.UNSUPPORTED),
        ],
    )
    def test_refused(self, fields, kind):
        with pytest.raises(Error) as caught:
            new(**fields).build()
        assert caught.value.kind == kind


names = st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"x").decode(errors="surrogateescape"))
numbers = st.integers(0, (1 << 32) - 1)


@st.composite
def headers(draw) -> Header:
    version = draw(st.sampled_from([2, 3]))
    cluster_bits = draw(st.integers(14, 21))
    cluster = st.integers(1, 1 << 40).map(lambda index: index << cluster_bits)
    size = draw(st.integers(0, 1 << 40))
    fields = {
        "version": version,
        "cluster_bits": cluster_bits,
        "size": size,
        "l1_size": -(-size // (1 << 2 * cluster_bits - 4)) + draw(st.integers(0, 100)),
        "l1_table_offset": draw(cluster),
        "refcount_table_offset": draw(cluster),
        "refcount_table_clusters": draw(st.integers(1, 4)),
        "nb_snapshots": draw(st.integers(0, 65536)),
        "snapshots_offset": draw(cluster),
        "backing_format": draw(st.none() | st.sampled_from(["raw", "qcow2"])),
        "data_file": draw(st.none() | names),
        "unknown_extensions": tuple(
            draw(st.lists(st.tuples(st.integers(1, 1000), st.binary(max_size=20)), max_size=3))
        ),
    }
    incompatible, autoclear = Incompatible(0), Autoclear(0)
    if version == 3:
        incompatible = Incompatible(draw(st.sampled_from([0, 1, 2, 4, 8, 16, 12, 31])))
        autoclear = Autoclear(draw(st.integers(0, (1 << 64) - 1)) & ~2)
        if Incompatible.DATA_FILE in incompatible:
            autoclear |= draw(st.sampled_from([0, 2]))
        fields |= {
            "incompatible": incompatible,
            "compatible": Compatible(draw(st.integers(0, (1 << 64) - 1))),
            "autoclear": autoclear,
            "refcount_order": draw(st.integers(0, 6)),
            "compression_type": CompressionType(int(Incompatible.COMPRESSION in incompatible)),
            "feature_names": tuple(
                draw(st.lists(st.builds(FeatureName, st.integers(0, 2), st.integers(0, 63), names)))
            ),
            "unknown_fields": draw(st.binary(max_size=20)).rstrip(b"\0"),
        }
    if Autoclear.DATA_FILE_RAW not in autoclear:
        fields["backing_file"] = draw(st.none() | names)
    if Autoclear.BITMAPS in autoclear:
        fields["bitmaps"] = BitmapsExtension(draw(st.integers(1, 65535)), draw(st.integers(1, 1 << 25)), draw(cluster))
    else:
        fields["bitmaps"] = draw(st.none() | st.builds(BitmapsExtension, numbers, numbers, numbers))
    method = draw(st.sampled_from(CryptMethod))
    fields["crypt_method"] = method
    if method == CryptMethod.LUKS:
        fields["encryption"] = EncryptionPointer(draw(cluster), draw(numbers))
    return Header(**fields)


@given(headers())
def test_round_trip(header):
    built = header.build()
    assert Header.parse(built) == header
    assert Header.parse(built).build() == built


@given(st.binary(max_size=300), st.data())
def test_any_damage_is_an_error_or_a_header(damage, data):
    image = bytearray(data.draw(st.sampled_from([PLAIN, VERSION_2, SMALL, DATA_FILE, BITMAPS, LUKS])))
    at = data.draw(st.integers(0, len(image)))
    image[at : at + len(damage)] = damage
    try:
        header = Header.parse(bytes(image))
    except Error:
        return
    try:
        built = header.build()
    except Error as error:
        # An image may do without the end marker, or without fields that we write.
        if error.kind != ErrorKind.NO_SPACE:
            raise
    else:
        assert Header.parse(built) == header
