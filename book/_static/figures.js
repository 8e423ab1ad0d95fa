// A figure opens as large as the window, by a click or by Enter; a mark under the pointer tells its values in the page's own style.
(() => {
  const open = (svg) => {
    const dialog = document.createElement("dialog"), close = document.createElement("button");
    const figure = document.createElement("div"), drawn = svg.cloneNode(true);
    dialog.className = "metake-zoom";
    dialog.setAttribute("aria-label", svg.getAttribute("aria-label") || "Figure");
    close.textContent = "Close";
    close.onclick = () => dialog.close();
    figure.className = "metake-figure";
    drawn.removeAttribute("width");
    drawn.removeAttribute("height");
    figure.append(drawn);
    dialog.append(close, figure);
    dialog.onclose = () => { dialog.remove(); svg.focus(); };
    document.body.append(dialog);
    dialog.showModal();
  };
  addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll(".bd-content .metake-figure > svg").forEach((svg) => {
      svg.addEventListener("click", () => open(svg));
      svg.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.preventDefault(); open(svg); } });
      svg.tabIndex = 0;
    });
  });
  let tip = null;
  const hide = () => { tip?.remove(); tip = null; };
  addEventListener("pointermove", (event) => {
    const mark = event.target.closest?.(".metake-figure svg *:has(> title)");
    if (!mark) return hide();
    const title = mark.querySelector(":scope > title");
    if (!title.dataset.says) { title.dataset.says = title.textContent; title.textContent = ""; }
    if (!tip) { tip = document.createElement("div"); tip.id = "metake-tip"; (event.target.closest("dialog") || document.body).append(tip); }
    tip.textContent = title.dataset.says;
    tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 12)}px`;
  });
  addEventListener("scroll", hide, true);
})();
