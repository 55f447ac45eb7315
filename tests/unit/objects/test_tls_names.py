"""Distinguished names as strings. That GnuTLS writes the same ones is seen in tests/interop/test_tls_creds.py."""

import pytest
from cryptography import x509
from cryptography.x509.name import _ASN1Type

import pki
from blkferry.errors import Error, ErrorKind
from blkferry.objects.tls import der
from blkferry.objects.tls.certificate import MAX_ATTRIBUTES
from blkferry.objects.tls.names import distinguished_name


def attribute(oid, value, kind=_ASN1Type.UTF8String):
    return x509.NameAttribute(x509.ObjectIdentifier(oid), value, kind, _validate=False)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([[("2.5.4.10", "Lab")], [("2.5.4.3", "client1")]], "O=Lab,CN=client1"),
        ([[("2.5.4.11", "One")], [("2.5.4.11", "Two")]], "OU=One,OU=Two"),
        ([[("2.5.4.10", "Lab, Inc.")], [("2.5.4.3", 'a "q" \\x')]], 'O=Lab\\, Inc.,CN=a \\"q\\" \\\\x'),
        ([[("2.5.4.3", " lead")], [("2.5.4.10", "trail ")]], "CN=\\ lead,O=trail\\ "),
        ([[("2.5.4.3", "#1")], [("2.5.4.10", "a#;<b>+c=d")]], "CN=\\#1,O=a#\\;\\<b\\>\\+c=d"),
        ([[("2.5.4.3", "zoë ☃")], [("1.2.3.4", "x")]], "CN=zoë ☃,1.2.3.4=#0c0178"),
        ([[("2.5.4.3", "\n")]], "CN=\n"),
        ([[("2.5.4.20", "1")], [("1.2.840.113549.1.9.1", "a@b")]], "telephoneNumber=#0c0131,EMAIL=#0c03614062"),
        ([[("2.5.4.3", "a\0b")]], "CN=#0c03610062"),
        ([[("2.5.4.3", "a"), ("2.5.4.10", "b")]], "CN=a+O=b"),
        ([], ""),
    ],
)
def test_parts_stand_in_the_order_of_the_certificate(parts, expected):
    names = [x509.RelativeDistinguishedName([attribute(*pair) for pair in part]) for part in parts]
    assert distinguished_name(pki.issue(x509.Name(names)).der) == expected


@pytest.mark.parametrize(
    ("oid", "kind", "expected"),
    [
        ("2.5.4.3", _ASN1Type.PrintableString, "CN=ab"),
        ("2.5.4.3", _ASN1Type.BMPString, "CN=ab"),
        ("2.5.4.3", _ASN1Type.IA5String, "CN=#16026162"),
        ("2.5.4.6", _ASN1Type.PrintableString, "C=ab"),
        ("1.2.840.113549.1.9.1", _ASN1Type.IA5String, "EMAIL=ab"),
        ("0.9.2342.19200300.100.1.25", _ASN1Type.IA5String, "DC=ab"),
    ],
)
def test_a_value_of_another_type_is_shown_as_it_is(oid, kind, expected):
    assert distinguished_name(pki.issue(x509.Name([attribute(oid, "ab", kind)])).der) == expected


def test_a_name_has_so_many_parts_at_most():
    def name_of(count):
        return x509.Name([attribute("2.5.4.11", str(index)) for index in range(count)])

    assert distinguished_name(pki.issue(name_of(MAX_ATTRIBUTES)).der).endswith(f"OU={MAX_ATTRIBUTES - 1}")
    with pytest.raises(Error) as caught:
        distinguished_name(pki.issue(name_of(MAX_ATTRIBUTES + 1)).der)
    assert caught.value.kind is ErrorKind.CORRUPT


@pytest.mark.parametrize("data", [b"", b"\x30", b"\x30\x80\0\0", b"\x30\x85\0\0\0\0\1x", b"\x3f\x81\0", b"\x30\x05a"])
def test_what_is_no_der_is_refused(data):
    with pytest.raises(ValueError, match=r"^(a |not )"):
        der.only(data, der.SEQUENCE)


@pytest.mark.parametrize(
    ("content", "expected"), [(b"\x55\x04\x03", "2.5.4.3"), (b"\x2a\x86\x48", "1.2.840"), (b"\x88\x37\x03", "2.999.3")]
)
def test_object_identifiers(content, expected):
    assert der.oid(content) == expected


@pytest.mark.parametrize("content", [b"", b"\x86", b"\x2a" + b"\x86" * 70 + b"\1"])
def test_object_identifiers_end_and_are_short(content):
    with pytest.raises(ValueError, match="does not end"):
        der.oid(content)
