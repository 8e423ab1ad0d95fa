// Search results quote the article, not the labels of the toolbar above it.
if (typeof Search !== "undefined") {
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".headerlink, script, style, svg, details > summary").forEach((e) => e.remove());
    const id = anchor && decodeURIComponent(anchor).replace(/^#/, "");
    const part = (id && page.getElementById(id)) || page.querySelector("article.bd-article");
    return part ? part.textContent.replace(/\s+/g, " ") : "";
  };
  // Opened from the disk, a page may not read another one: the results stand without a quotation.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
