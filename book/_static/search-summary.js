// Search results quote the article, not the labels of the toolbar above it.
// A formula in a quotation is letters, not the commands that set it.
const GREEK = { alpha: "α", beta: "β", gamma: "γ", Gamma: "Γ", delta: "δ", Delta: "Δ", varepsilon: "ε", epsilon: "ε", eta: "η", kappa: "κ", lambda: "λ", Lambda: "Λ", mu: "μ", nu: "ν", rho: "ρ", sigma: "σ", Sigma: "Σ", tau: "τ", theta: "θ", varphi: "φ", nabla: "∇", le: "≤", ge: "≥", approx: "≈", times: "×", cdot: "·", top: "ᵀ", leftarrow: "←", to: "→", infty: "∞", lVert: "‖", rVert: "‖", Vert: "‖", "|": "‖" };
const letters = (tex) => tex.replace(/^\\\(|\\\)$/g, "").replace(/\\([A-Za-z]+|\|)/g, (_, name) => GREEK[name] ?? "").replace(/[\\{}$^_]/g, "").replace(/\s+/g, " ").trim();
if (typeof Search !== "undefined") {
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".headerlink, script, style, svg, details > summary, div.math").forEach((e) => e.remove());
    page.querySelectorAll("span.math").forEach((e) => { e.textContent = letters(e.textContent); });
    page.querySelectorAll("td, th, dt, li, p").forEach((e) => e.append(e.matches("td, th") ? " · " : " "));
    const id = anchor && decodeURIComponent(anchor).replace(/^#/, "");
    const part = (id && page.getElementById(id)) || page.querySelector("article.bd-article");
    return part ? part.textContent.replace(/\s+/g, " ") : "";
  };
  // Opened from the disk, a page may not read another one: the results stand without a quotation.
  if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
