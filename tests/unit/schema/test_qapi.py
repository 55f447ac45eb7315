"""How types are declared: what the mechanism derives, and what it refuses to be told."""

from typing import Annotated, Literal

import msgspec
import pytest

from blkferry.errors import Error
from blkferry.schema import model
from blkferry.schema.qapi import EXTENSION, Doc, Struct, TagOf, Uint16, branch, union, variants
from blkferry.schema.registry import COMMANDS, EVENTS
from blkferry.schema.visit import visit


def animal_union():
    @union("animal-kind")
    class Animal(Struct):
        """A union with a dash in its tag."""

        animal_kind: Annotated[str, Doc("the kind")]
        name: Annotated[str | None, Doc("its name", since="1.0")] = None

    return Animal


def add_dog(base):
    @branch
    class Dog(base):
        """Barks."""

        animal_kind: Literal["dog"] = "dog"
        legs: Annotated[Uint16, Doc("how many")] = 4

    return Dog


def test_members_come_from_annotations():
    class Sample(Struct, rename={"in_between": "in-between"}):
        """A sample."""

        snake_case: Annotated[int, Doc("doc", since="9.9", features=("unstable",))]
        in_between: Annotated[str, Doc("text")] = "x"
        odd: Annotated[str | None, Doc("renamed")] = msgspec.field(name="str", default=None)
        filled: Annotated[int, Doc("always there", always=True)] = 0

    first, second, third, fourth = model.members(Sample)
    assert (first.name, first.field, first.optional, first.doc.since) == ("snake_case", "snake_case", False, "9.9")
    assert (second.name, second.optional, second.default) == ("in-between", True, "x")
    assert (third.name, third.field, third.type) == ("str", "odd", model.Builtin.STR)
    assert not fourth.optional


def test_structs_are_frozen_and_take_keywords_only():
    dog = add_dog(animal_union())
    rex = dog(name="rex")
    assert (rex.animal_kind, rex.legs) == ("dog", 4)
    with pytest.raises(AttributeError):
        rex.legs = 3
    with pytest.raises(TypeError):
        dog("rex")


def test_a_branch_adds_its_members_to_those_of_the_base():
    animal = animal_union()
    dog = add_dog(animal)
    assert [member.name for member in model.members(animal)] == ["animal-kind", "name"]
    assert [member.name for member in model.members(dog)] == ["name", "legs"]
    assert [member.name for member in model.branch_members(dog)] == ["legs"]
    assert variants(dog) is variants(animal)
    assert model.variants_of(dog) is None
    assert visit(animal, {"animal-kind": "dog", "legs": 3}) == dog(legs=3)


def test_a_subclass_of_a_branch_is_another_branch():
    animal = animal_union()
    dog = add_dog(animal)

    @branch
    class Wolf(dog):
        """Howls."""

        animal_kind: Literal["wolf"] = "wolf"

    seen = visit(animal, {"animal-kind": "wolf", "legs": 2})
    assert seen == Wolf(legs=2)
    assert not isinstance(visit(animal, {"animal-kind": "dog"}), Wolf)


def test_the_loader_brings_in_branches_when_they_are_needed():
    animal = animal_union()
    asked = []

    def load(tag):
        asked.append(tag)
        if tag in {"dog", None} and "dog" not in variants(animal).known:
            add_dog(animal)

    variants(animal).loader = load
    assert visit(animal, {"animal-kind": "dog"}).legs == 4
    assert visit(animal, {"animal-kind": "dog"}).legs == 4
    assert asked == ["dog"]
    with pytest.raises(Error, match="Parameter 'animal-kind' does not accept value 'cat'") as caught:
        visit(animal, {"animal-kind": "cat"})
    assert caught.value.hint == "Possible: dog."
    assert asked == ["dog", "cat", None]


def test_what_the_loader_raises_reaches_the_caller():
    animal = animal_union()

    def load(tag):
        raise ImportError(tag)

    variants(animal).loader = load
    with pytest.raises(ImportError, match="dog"):
        visit(animal, {"animal-kind": "dog"})


def test_one_tag_has_one_branch():
    animal = animal_union()
    add_dog(animal)
    with pytest.raises(TypeError, match="'dog' is fixed by both"):
        add_dog(animal)


def test_a_branch_must_fix_its_tag():
    animal = animal_union()
    with pytest.raises(TypeError, match="does not fix 'animal-kind'"):

        @branch
        class Nothing(animal):
            """Has no tag."""


def test_every_member_needs_a_doc():
    class Silent(Struct):
        """Says nothing."""

        member: str

    with pytest.raises(TypeError, match="has no Doc"):
        model.members(Silent)


@pytest.mark.parametrize("hint", [float, dict[str, str], str | int, Annotated[str | int, Doc("unnamed")], bytes])
def test_annotations_without_meaning_are_refused(hint):
    with pytest.raises(TypeError, match="has no meaning"):
        model.resolve(hint)


def test_tag_of_is_the_enum_of_a_union():
    animal = animal_union()
    add_dog(animal)
    assert visit(Annotated[str, TagOf(animal)], "dog") == "dog"
    with pytest.raises(Error):
        visit(Annotated[str, TagOf(animal)], "cat", path="kind")


def structs_of(type_, seen):
    """All structs that a type mentions."""
    match type_:
        case model.Array(element=element):
            structs_of(element, seen)
        case model.Alternate(choices=choices):
            for choice in choices:
                structs_of(choice, seen)
        case model.Object(cls=cls) if cls not in seen:
            seen.add(cls)
            for member in model.members(cls):
                structs_of(member.type, seen)
            for each in type_.variants.all().values() if type_.variants is not None else ():
                structs_of(model.Object(each), seen)
    return seen


def test_everything_that_is_declared_is_documented():
    seen = set()
    for command in COMMANDS.values():
        assert command.doc.endswith(".")
        assert command.since or EXTENSION in command.features
        if command.arguments is not None:
            structs_of(model.Object(command.arguments), seen)
        if command.returns is not None:
            structs_of(model.resolve(command.returns), seen)
    for event in EVENTS.values():
        structs_of(model.Object(event.data), seen)
    assert len(seen) > 30
    assert [cls for cls in seen if not (cls.__doc__ or "").strip()] == []
    assert [f"{cls}.{member.name}" for cls in seen for member in model.members(cls) if not member.doc.text] == []
