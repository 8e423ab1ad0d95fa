"""What needs the address of the public repository: launch buttons, links to source and issues, the archive, the DOI.

All of it follows from `metake_repository` in _config.yml (and, once an archive has given one, `metake_doi`); without
it nothing of this kind is in the book, and the page on citing says so.
"""

import re

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

ADDRESS = re.compile(r"https://(github\.com|gitlab\.com)/([\w.-]+)/([\w.-]+)")  # whose buttons the theme knows
DOI = re.compile(r"10\.\d{4,}/\S+")
BRANCH = "main"


def address(config) -> str:
    """The repository's address, without a slash or `.git` at its end; "" if there is none."""
    given = config.metake_repository.strip().rstrip("/").removesuffix(".git")
    if given and not ADDRESS.fullmatch(given):
        raise ExtensionError(
            f"metake_repository in _config.yml is {config.metake_repository!r}; expected an address on "
            "GitHub or GitLab, such as https://github.com/NAME/metake, or nothing"
        )
    if config.metake_doi and not DOI.fullmatch(config.metake_doi):
        raise ExtensionError(
            f"metake_doi in _config.yml is {config.metake_doi!r}; expected one such as 10.5281/zenodo.1234567, "
            "or nothing"
        )
    return given


def links(config) -> dict[str, str]:
    """What there is to be linked, by its name."""
    if not (there := address(config)):
        return {}
    host, _, name = ADDRESS.fullmatch(there).groups()
    gitlab = host == "gitlab.com"
    archive = f"-/archive/{BRANCH}/{name}-{BRANCH}.zip" if gitlab else f"archive/refs/heads/{BRANCH}.zip"
    issues = "-/issues" if gitlab else "issues"
    found = {"Source": there, "Questions and mistakes": f"{there}/{issues}", "Archive": f"{there}/{archive}"}
    return found | ({"DOI": f"https://doi.org/{config.metake_doi}"} if config.metake_doi else {})


def launch(app, config):
    """Buttons that open a page in Binder or Colab, and links to its source: only where there is a repository."""
    if there := address(config):
        config.html_theme_options |= {
            "repository_url": there, "repository_branch": BRANCH, "path_to_docs": "",
            "use_repository_button": True, "use_issues_button": True,
            "launch_buttons": {
                "notebook_interface": "jupyterlab", "binderhub_url": "https://mybinder.org",
                # it opens what is on GitHub alone
                **({"colab_url": "https://colab.research.google.com"} if "github" in there else {})
            }
        }


class Public(SphinxDirective):
    """Where the project is to be had, or that this copy of the book does not know."""

    def run(self) -> list[nodes.Node]:
        config = self.env.config
        if not (found := links(config)):
            told = "This copy was built without the address of a public repository, so it has no launch buttons, "
            told += "archive or DOI to point to."
            return [nodes.paragraph("", told)]
        line = nodes.paragraph()
        for i, (name, target) in enumerate(found.items()):
            line += [nodes.Text(" · " * bool(i)), nodes.reference("", name, refuri=target)]
        line += nodes.Text("" if config.metake_doi else " · DOI: none yet")
        return [line]


def setup(app):
    app.add_config_value("metake_repository", "", "html", types=[str])
    app.add_config_value("metake_doi", "", "html", types=[str])
    app.add_directive("public", Public)
    app.connect("config-inited", launch, priority=100)
