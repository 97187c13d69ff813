document.querySelectorAll("table.sortable").forEach(table => {
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = Array.from(table.tBodies[0].rows);
      rows.sort((a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === "");
        const x = Number(key(a)), y = Number(key(b));
        const order = Number.isNaN(x) || Number.isNaN(y) ? key(a).localeCompare(key(b)) : x === y ? 0 : x - y;
        return down ? -order : order;
      });
      table.tBodies[0].append(...rows);
    });
  });
});
document.querySelectorAll("input[type=search]").forEach(field => {
  const rows = Array.from(document.getElementById(field.dataset.table).tBodies[0].rows);
  const count = field.parentElement.querySelector("output");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach(row => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    });
    count.textContent = words.length ? shown + " of " + rows.length : "";
  });
});
const button = document.getElementById("look"), root = document.documentElement;
const system = window.matchMedia("(prefers-color-scheme: dark)");
const kept = () => { try { return localStorage.getItem("osculate-look"); } catch { return null; } };
const show = look => {
  if (look) root.dataset.look = look;
  button.textContent = (root.dataset.look ?? (system.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
};
button.hidden = false;
button.title = "change between light and dark";
button.addEventListener("click", () => {
  const look = button.textContent;
  show(look);
  try { localStorage.setItem("osculate-look", look); } catch { /* a page from disk may not keep anything */ }
});
system.addEventListener("change", () => show());
show(kept());
document.querySelectorAll("button.csv").forEach(button => button.addEventListener("click", () => {
  const quoted = text => /[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text;
  const value = cell => cell.dataset.value ?? cell.textContent.trim();
  const rows = Array.from(button.closest(".tabled").querySelector("table").rows);
  const text = rows.map(row => Array.from(row.cells).map(value).map(quoted).join(",")).join("\n") + "\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = button.dataset.file;
  link.click();
  URL.revokeObjectURL(link.href);
}));
