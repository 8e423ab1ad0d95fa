"""One setting makes the book public: with it buttons and links have the right form, without it there are none."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx_book_theme import header_buttons
from sphinx_book_theme.header_buttons import launch

ROOT = Path(__file__).resolve().parents[2]
HUB = "https://github.com/someone/metake"


@pytest.fixture(scope="module")
def public():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "book" / "_ext")
        yield importlib.import_module("public")


def config(repository="", doi=""):
    return SimpleNamespace(metake_repository=repository, metake_doi=doi, html_theme_options={})


class Settings(SimpleNamespace):
    """Sphinx's configuration, as far as the theme reads it: by name and by item."""

    def __getitem__(self, name):
        return getattr(self, name)


def buttons(public, page, given):
    """The launch buttons that the theme puts on a page, by their text."""
    public.launch(None, given)
    path = str(ROOT / page)
    settings = Settings(html_context={}, html_theme_options=given.html_theme_options)
    app = SimpleNamespace(
        env=SimpleNamespace(doc2path=lambda _: path), config=settings, outdir=str(ROOT),
        builder=SimpleNamespace(theme_options=given.html_theme_options)
    )
    header_buttons.update_context_with_repository_info(app)
    shown: list = []
    context = {"header_buttons": shown, "sourcename": path, **settings.html_context}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_is_notebook", lambda *_: page.endswith(".ipynb"))
        launch.add_launch_buttons(app, page.rpartition(".")[0], "page.html", context, None)
    return {button["text"]: button["url"] for group in shown for button in group["buttons"]}


def test_the_setting_is_one_and_empty():
    settings = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))["sphinx"]["config"]
    assert settings["metake_repository"] == settings["metake_doi"] == ""
    assert "repository_url" not in settings["html_theme_options"] and "launch_buttons" not in settings


def test_with_an_address_a_notebook_opens_elsewhere_and_prose_does_not(public):
    found = buttons(public, "notebooks/attenuation.ipynb", config(HUB))
    assert found == {
        "Binder": "https://mybinder.org/v2/gh/someone/metake/main?urlpath=lab/tree/notebooks/attenuation.ipynb",
        "Colab": "https://colab.research.google.com/github/someone/metake/blob/main/notebooks/attenuation.ipynb",
    }
    assert buttons(public, "book/data.md", config(HUB)) == {}
    assert buttons(public, "notebooks/attenuation.ipynb", config()) == {}
    lab = buttons(public, "notebooks/attenuation.ipynb", config("https://gitlab.com/someone/metake"))
    assert lab == {"Binder": found["Binder"].replace("/gh/someone/", "/gl/someone%2F")}


@pytest.mark.parametrize("written", [HUB, f"{HUB}/", f"{HUB}.git"])
def test_links_have_the_form_of_the_host(public, written):
    assert public.links(config(written, "10.5281/zenodo.1234567")) == {
        "Source": HUB, "Questions and mistakes": f"{HUB}/issues",
        "Archive": f"{HUB}/archive/refs/heads/main.zip", "DOI": "https://doi.org/10.5281/zenodo.1234567",
    }
    lab = public.links(config("https://gitlab.com/someone/metake"))
    assert lab["Archive"] == "https://gitlab.com/someone/metake/-/archive/main/metake-main.zip" and "DOI" not in lab


@pytest.mark.parametrize(("given", "says"), [
    (config("someone/metake"), "metake_repository"), (config("http://github.com/a/b"), "metake_repository"),
    (config("https://github.com/a"), "metake_repository"),
    (config("https://example.org/a/b"), "metake_repository"), (config(HUB, "zenodo.1"), "metake_doi"),
])  # fmt: skip
def test_what_is_no_address_is_refused(public, given, says):
    with pytest.raises(ExtensionError, match=says):
        public.launch(None, given)


def test_the_page_on_citing_says_which(public):
    def shown(given):
        directive = public.Public.__new__(public.Public)
        directive.state = SimpleNamespace(document=SimpleNamespace(settings=SimpleNamespace(
            env=SimpleNamespace(config=given))))  # fmt: skip
        return directive.run()[0]

    with_it, without = shown(config(HUB)), shown(config())
    assert [link["refuri"] for link in with_it.findall(nodes.reference)] == [*public.links(config(HUB)).values()]
    assert with_it.astext().endswith("DOI: none yet") and "without the address" in without.astext()
    assert "```{public}" in (ROOT / "book" / "data.md").read_text("utf-8")
