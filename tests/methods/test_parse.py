from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from sd_tokenmerge.methods import ATC, METHODS, KMedoids, Method, ToMeSD, parse_method
from sd_tokenmerge.methods.parse import parse_method_string


@dataclass(frozen=True)
class Example(Method):
    name: ClassVar[str] = "example"
    switch: bool = False
    count: int = 2
    share: float = 0.5
    kind: Literal["small", "large"] = "small"

    def _cluster(self, tokens, num_clusters, grid, seed, scores):
        raise NotImplementedError


def parse_example(text):
    return parse_method_string(text, {"example": Example})


@pytest.mark.parametrize("name", METHODS)
def test_a_bare_name_means_the_defaults(name):
    assert parse_method(name) == METHODS[name]()
    assert str(METHODS[name]()) == name


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("atc:linkage=complete", ATC(linkage="complete")),
        ("atc:linkage=average", ATC()),
        ("tome-sd:stride=4,random=true", ToMeSD(stride=4, random=True)),
        ("tome-sd:random=false", ToMeSD()),
        ("kmedoids:iterations=3,weighted=true", KMedoids(weighted=True, iterations=3)),
    ],
)
def test_options_are_read(text, method):
    assert parse_method(text) == method


def test_every_type_is_read_and_written():
    method = parse_example("example:switch=true,count=-7,share=0.25,kind=large")
    assert method == Example(switch=True, count=-7, share=0.25, kind="large")
    assert parse_example(str(method)) == method
    assert str(method) == "example:switch=true,count=-7,share=0.25,kind=large"
    assert parse_example("example:share=1e-3") == Example(share=0.001)
    assert parse_example(str(Example(share=1e-30))) == Example(share=1e-30)


def test_an_instance_passes_through():
    method = ATC()
    assert parse_method(method) is method


@pytest.mark.parametrize("text", ["", "ATC", "at", " atc", "atc ", "atc;linkage=single", "kmean"])
def test_an_unknown_method_lists_the_known_ones(text):
    with pytest.raises(
        ValueError, match=r"must be one of atc, dpc-knn, grid, kmeans, .* got"
    ) as error:
        parse_method(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atc:", r"the options of atc are linkage=single\|complete\|average, got ''"),
        ("atc:linkage", "the options of atc are .* got 'linkage'"),
        ("atc:Linkage=single", "the options of atc are .* got 'Linkage=single'"),
        ("atc:linkage=single,", "the options of atc are .* got ''"),
        ("atc: linkage=single", "the options of atc are .* got ' linkage=single'"),
        ("atc:name=x", "the options of atc are .* got 'name=x'"),
        ("tome:stride=2", "tome has no options, got 'stride=2'"),
        ("atc:linkage=", r"linkage must be single\|complete\|average, got ''"),
        ("atc:linkage=mean", r"linkage must be single\|complete\|average, got 'mean'"),
        ("atc:linkage=single=single", "linkage must be .* got 'single=single'"),
        ("atc:linkage=single,linkage=single", "option 'linkage' is given twice"),
        ("tome-sd:random=True", r"random must be true\|false, got 'True'"),
        ("tome-sd:random=1", r"random must be true\|false, got '1'"),
        ("tome-sd:stride=2.0", "stride must be an integer, got '2.0'"),
        ("tome-sd:stride= 2", "stride must be an integer, got ' 2'"),
        ("tome-sd:stride=1_0", "stride must be an integer, got '1_0'"),
        ("tome-sd:stride=two", "stride must be an integer, got 'two'"),
        ("tome-sd:stride=", "stride must be an integer, got ''"),
    ],
)
def test_bad_options_say_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_method(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "half", "", "0.5.5", "1e999"])
def test_a_number_must_be_a_finite_number(value):
    with pytest.raises(ValueError, match=f"share must be a number, got '{value}'"):
        parse_example(f"example:share={value}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tome-sd:stride=1", "`stride` of tome-sd must be at least 2, got 1"),
        ("tome-sd:stride=-2", "`stride` of tome-sd must be at least 2, got -2"),
        ("kmeans:iterations=0", "`iterations` of kmeans must be at least 1, got 0"),
        ("kmedoids:iterations=0", "`iterations` of kmedoids must be at least 1, got 0"),
        ("dpc-knn:k=0", "`k` of dpc-knn must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


@pytest.mark.parametrize("method", [None, 3, ATC])
def test_only_strings_and_methods_are_methods(method):
    with pytest.raises(TypeError, match="`method` must be a string or a Method, got"):
        parse_method(method)
