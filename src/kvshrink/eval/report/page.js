// Sort a table's rows within each of its groups; without this script the tables are merely in the order as written.
for (const table of document.querySelectorAll("table.sortable")) {
  const head = table.tHead.rows[table.tHead.rows.length - 1];
  [...head.cells].forEach((th, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      // numbers are first wanted large to small, names from a
      const first = column === 0 ? "ascending" : "descending";
      const order = th.ariaSort === null || th.ariaSort === "none" || th.ariaSort !== first ? first
        : first === "ascending" ? "descending" : "ascending";
      for (const other of head.cells) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", order);
      const key = (row) => row.cells[column]?.dataset.value ?? "";
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return order === "ascending" ? difference : -difference;
      };
      for (const body of table.tBodies)
        body.append(...[...body.rows].filter((row) => !row.classList.contains("group")).sort(compare));
    });
  });
}
