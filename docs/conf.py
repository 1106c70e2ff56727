"""How Sphinx builds the site: `python -m sphinx -W --keep-going docs site`.

The reference of names, parts and commands is written by `make_reference` at the start of a build.
The tutorials are executed, and an error in one of them ends the build.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import make_reference  # noqa: E402
from pygments.lexers.shell import BashLexer  # noqa: E402

import fedjaxprune  # noqa: E402

project = "fedjaxprune"
author = "The fedjaxprune authors"
version = release = fedjaxprune.__version__

extensions = ["myst_nb", "sphinx_design", "link_terms"]
exclude_patterns = ["notes", "notebooks", "jupyter_execute"]
# Names of types that are not public may match several others; all links of ours are full paths.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 4
# A link to a file that is not a page of the site, such as an example, offers the file.
nb_execution_mode = "cache"
nb_execution_timeout = 600  # seconds for a page
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

default_role = "code"
maximum_signature_line_length = 120
add_module_names = False
toc_object_entries = False
highlight_language = "text"
pygments_style = "friendly"
pygments_dark_style = "github-dark"

html_theme = "furo"
html_title = f"fedjaxprune {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5cad", "color-brand-content": "#0b5cad"},
    "dark_css_variables": {"color-brand-primary": "#7db8f0", "color-brand-content": "#7db8f0"},
}


def setup(app):
    """Write the generated pages before Sphinx looks for pages."""
    make_reference.write(HERE / "reference")
    app.add_lexer("console", BashLexer)  # commands without a prompt, not a session
    return {"parallel_read_safe": True}
