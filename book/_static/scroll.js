// A box that scrolls sideways can be reached and named by keyboard and screen reader; one that does not is no stop on the way.
(() => {
  const boxes = ".bd-content .metake-scroll, .bd-content .output.text_html, .bd-content div.math, .bd-content mjx-container[display]";
  const label = (box) => {
    const caption = box.querySelector("caption") || box.closest("figure")?.querySelector("figcaption .caption-text");
    return caption ? caption.textContent.replace(/\s*#\s*$/, "").trim() : "wider than the page";
  };
  const mark = () => document.querySelectorAll(boxes).forEach((box) => {
    box.classList.remove("metake-close");
    box.classList.toggle("metake-close", box.scrollWidth > box.clientWidth + 1 && box.querySelector("table") !== null);
    const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    const ends = () => box.classList.toggle("metake-at-end", box.scrollLeft + box.clientWidth >= box.scrollWidth - 2);
    box.classList.toggle("metake-scrolls", scrolls);
    if (scrolls && !box.dataset.fades) { box.dataset.fades = "yes"; box.addEventListener("scroll", ends); }
    ends();
    if (scrolls) Object.entries({ tabindex: "0", role: "region", "aria-label": label(box) }).forEach(([k, v]) => box.setAttribute(k, v));
    else ["tabindex", "role", "aria-label"].forEach((k) => box.removeAttribute(k));
  });
  // A formula a little too wide for its line becomes a little smaller; a much too wide one scrolls.
  const fit = () => document.querySelectorAll('mjx-container[display="true"]').forEach((formula) => {
    formula.dataset.size ??= formula.style.fontSize;
    formula.style.fontSize = formula.dataset.size;
    const share = formula.clientWidth / formula.scrollWidth;
    if (share < 1 && share >= 0.75) formula.style.fontSize = `${0.99 * share * parseFloat(getComputedStyle(formula).fontSize)}px`;
  });
  const all = () => { fit(); mark(); };
  addEventListener("load", () => window.MathJax?.startup?.promise ? window.MathJax.startup.promise.then(all) : all());
  addEventListener("resize", all);
  addEventListener("toggle", all, true);
  addEventListener("click", () => setTimeout(all, 400));
})();
